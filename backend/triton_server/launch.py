"""Starts the Triton Inference Server that the `nvidia-pytriton` wheel carries, and stops it without leftovers.

    with TritonServer(engine_dir="engines/diffusiongemma", grpc_port=0, http_port=0, metrics_port=0) as server:
        client = tritonclient.grpc.InferenceServerClient(server.grpc_url)

A server runs from a staging directory, removed when it stops:

    backends/python/    links: the Python backend, and its stub for the running Python
    models/NAME/        config.pbtxt with this start's parameters; the version folders are links to the model repository
    server.log
"""

import http.client
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from backend.triton_server.model_config import Instances, ModelConfigError, changed_config

MODEL_NAME = "diffusiongemma"
MODEL_REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"

_POLL_INTERVAL_S = 0.1
_KILL_TIMEOUT_S = 2.0  # after exit_timeout_s; a server with an open gRPC stream gives up then, but does not exit


class ServerError(RuntimeError):
    """The server cannot start, does not load the model, or died; the message is one line."""


class TritonServer:
    """A running server with one model, stopped when the `with` block ends. Entering waits until the model is ready.

    A port of 0 becomes a free one. `engine_dir` None keeps the one of config.pbtxt; `parameters` replaces others of its
    parameters, `instances` its instance group. A model may take `start_timeout_s` to load; a request may go on for
    `exit_timeout_s` after the stop began.
    """

    def __init__(
        self,
        *,
        engine_dir: str | Path | None = None,
        model_repository: str | Path = MODEL_REPOSITORY,
        host: str = "127.0.0.1",
        grpc_port: int = 8001,
        http_port: int = 8000,
        metrics_port: int = 8002,
        parameters: Mapping[str, str] | None = None,
        instances: Instances | None = None,
        start_timeout_s: float = 1800.0,
        exit_timeout_s: int = 10,
    ):
        self._model_dir = Path(model_repository).resolve() / MODEL_NAME
        self._parameters = dict(parameters or {})
        self._instances = instances
        if engine_dir is not None:
            self._parameters["engine_dir"] = str(Path(engine_dir).resolve())
        self._host = host
        self._ports = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
        self._start_timeout_s = start_timeout_s
        self._exit_timeout_s = exit_timeout_s
        self._process: subprocess.Popen | None = None
        self._staging: Path | None = None

    @property
    def grpc_url(self) -> str:
        """host:port, as tritonclient wants it."""
        return f"{self._host}:{self._ports['grpc']}"

    @property
    def http_url(self) -> str:
        return f"http://{self._host}:{self._ports['http']}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self._host}:{self._ports['metrics']}/metrics"

    @property
    def log_path(self) -> Path:
        """The server's log; it exists while the server runs."""
        return self._staging / "server.log"

    @property
    def pid(self) -> int:
        """Process id of the server, which is also the id of its process group and session."""
        return self._process.pid

    @property
    def shm_prefix(self) -> str:
        """What the names of the shared memory regions of this server begin with."""
        return self._staging.name

    def __enter__(self) -> "TritonServer":
        _check_environment()
        try:
            self._staging = Path(tempfile.mkdtemp(prefix="diffusiongemma_server_"))
            stage_backend(self._staging / "backends" / "python")
            stage_model(self._model_dir, self._staging / "models" / MODEL_NAME, self._parameters, self._instances)
            self._host = _address(self._host)
            self._ports = _free_ports(self._host, self._ports)
            self._start()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def check_alive(self) -> None:
        """Raises ServerError with the reason from the log if the server is no longer running."""
        if self._process.poll() is not None:
            reason = failure_reason(self.log_path.read_text())
            raise ServerError(f"tritonserver ended with exit code {self._process.returncode}: {reason}")

    def stop(self) -> None:
        """Ends the server, its stubs and its shared memory, and removes the staging directory. May be called again."""
        try:
            if self._process is not None:
                self._end_processes()
        finally:
            if self._staging is not None:
                for region in Path("/dev/shm").glob(f"{self.shm_prefix}*"):
                    region.unlink(missing_ok=True)
                shutil.rmtree(self._staging, ignore_errors=True)

    def _start(self) -> None:
        arguments = {
            "backend-directory": self._staging / "backends",
            "model-repository": self._staging / "models",
            "model-control-mode": "explicit",
            "load-model": MODEL_NAME,
            "exit-timeout-secs": self._exit_timeout_s,
            # A prefix of our own, so that stopping removes the regions of this server and no other's.
            "backend-config": f"python,shm-region-prefix-name={self.shm_prefix}",
        }
        for name, port in self._ports.items():
            arguments |= {f"{name}-address": self._host, f"{name}-port": port}
        options = [f"--{name}={value}" for name, value in arguments.items()]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [_bundled("bin/tritonserver"), "--disable-auto-complete-config", *options],
                env=_environment() | {"TMPDIR": str(self._staging)},  # programs are unpacked there
                cwd=self._staging,  # the stub puts its working directory first on sys.path
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us, and a group can be killed whole
            )

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + self._start_timeout_s
        while not self._is_ready():
            self.check_alive()
            if time.monotonic() > deadline_s:
                line = self.log_path.read_text().strip().rpartition("\n")[2]
                raise ServerError(f"model {MODEL_NAME}: not ready after {self._start_timeout_s:g} s; the log ends with: {line}")
            time.sleep(_POLL_INTERVAL_S)
        self.check_alive()

    def _is_ready(self) -> bool:
        host = "127.0.0.1" if self._host == "0.0.0.0" else self._host
        # http.client, because urllib would go through a proxy of the environment.
        with closing(http.client.HTTPConnection(host, self._ports["http"], timeout=5)) as connection:
            try:
                connection.request("GET", f"/v2/models/{MODEL_NAME}/ready")
                return connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                return False

    def _end_processes(self) -> None:
        try:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._exit_timeout_s + _KILL_TIMEOUT_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # a killed or crashed server leaves its stubs behind
            self._process.wait()


def stage_backend(directory: Path) -> None:
    """Makes `directory` a Python backend of links into the wheel, with the stub of the running Python.

    Raises ServerError if a shared library of the stub is missing: the server would find out only after two minutes.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = _bundled(f"python_backend_stubs/{version}/triton_python_backend_stub")
    directory.mkdir(parents=True)
    shared = [_bundled(f"backends/python/{name}") for name in ("libtriton_python.so", "triton_python_backend_utils.py")]
    for file in (stub, *shared):
        (directory / file.name).symlink_to(file)
    listing = subprocess.run(["ldd", stub], env=_environment(), capture_output=True, text=True, check=True).stdout
    missing = [line.split()[0] for line in listing.splitlines() if "not found" in line]
    if missing:
        where = sysconfig.get_config_var("LIBDIR")
        raise ServerError(
            f"Python backend: shared libraries {missing} not found, expected in {where}; install Python's shared library"
        )


def stage_model(source: Path, target: Path, parameters: Mapping[str, str], instances: Instances | None = None) -> None:
    """Makes `target` the model in `source` with other `parameters` and `instances`. A relative engine_dir still starts at
    `source`.

    Raises ServerError if `source` is no model or has no such parameter.
    """
    if not (source / "config.pbtxt").is_file():
        raise ServerError(
            f"model repository: {source} has no config.pbtxt, expected the model {MODEL_NAME}; pass --model-repository"
        )
    try:
        text = changed_config(source / "config.pbtxt", parameters, instances)
    except ModelConfigError as error:
        raise ServerError(str(error)) from None
    target.mkdir(parents=True)
    (target / "config.pbtxt").write_text(text, encoding="utf-8")
    for version in source.iterdir():
        if version.is_dir() and version.name.isdecimal():
            (target / version.name).symlink_to(version)


def failure_reason(log: str) -> str:
    """The one line of a server's log that says why it does not run."""
    patterns = (
        # What the model raised, without the traceback that follows it in the same line
        r"failed to load '.*?' version \d+: (?:Internal: )?(?:[\w.]+(?:Error|Exception): )?(.*?)(?:\\n|\"$)",
        r"Poll failed for model directory (.*?)\"?$",
        r"failed to start (\w+ service: .*?)\s*\"?$",
        r"^error: (.*)",
        r"^E\d+ .*?\] \"(.*?)\"?$",
    )
    for pattern in patterns:
        if match := re.search(pattern, log, re.MULTILINE):
            return match[1]
    return log.strip().rpartition("\n")[2] or "its log is empty"


def _check_environment() -> None:
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".")[0]) >= 2:
        raise ServerError(f"numpy: got {numpy_version}, expected below 2, or the bundled server aborts; pip install 'numpy<2'")


def _bundled(path: str) -> Path:
    spec = importlib.util.find_spec("pytriton")
    if spec is None:
        raise ServerError(
            "tritonserver: the package nvidia-pytriton that carries it is not installed; pip install nvidia-pytriton"
        )
    file = Path(spec.submodule_search_locations[0]) / "tritonserver" / path
    if not file.is_file():
        raise ServerError(f"tritonserver: nvidia-pytriton has no {path}; expected a release for this Python and platform")
    return file


def _environment() -> dict[str, str]:
    """The server's environment: the stub finds this very Python, its shared library, and this very package."""
    first = {
        "PATH": str(Path(sys.executable).parent),
        "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR") or "",
        "PYTHONPATH": str(MODEL_REPOSITORY.parent),
    }
    return os.environ | {name: os.pathsep.join(filter(None, (path, os.environ.get(name)))) for name, path in first.items()}


def _address(host: str) -> str:
    """The numbers of a host's name: Triton's HTTP services take nothing else. Raises ServerError if it has none."""
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise ServerError(f"host: {host!r} has no IPv4 address ({error.strerror}); pass another --host") from None


def leave_on_signals() -> None:
    """SIGINT, SIGTERM and a terminal that is closed leave `with` blocks; under nohup the last does nothing."""
    numbers = [signal.SIGINT, signal.SIGTERM]  # both, for who starts it in the background of a shell gets SIGINT ignored
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, lambda *_: sys.exit(0))


def _free_ports(host: str, ports: Mapping[str, int]) -> dict[str, int]:
    """Ports with every 0 replaced by a free one. Raises ServerError for one that is taken."""
    chosen = {}
    with ExitStack() as sockets:  # all held until the last is chosen, so that no port is chosen twice
        for name, port in ports.items():
            probe = sockets.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ServerError(
                    f"{name} port: {host}:{port} cannot be used ({error.strerror}); pass another --{name}-port, or 0"
                ) from None
            chosen[name] = probe.getsockname()[1]
    return chosen
