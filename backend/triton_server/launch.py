"""Starts the Triton Inference Server that the `nvidia-pytriton` wheel carries, and stops it without leftovers.

    with TritonServer(engine_dir="engines/diffusiongemma", grpc_port=0, http_port=0, metrics_port=0) as server:
        client = tritonclient.grpc.InferenceServerClient(server.grpc_url)

A server runs from a staging directory (`staging`) with its log, `server.log`. It is removed when the server stops, but for
the logs if what ends the `with` block is an error, or if the server's log tells of errors (`server_log`).
"""

import http.client
import importlib.metadata
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from backend.addresses import AddressError, free_ports, ipv4_address, is_loopback
from backend.child_process import GroupGuard, how_ended
from backend.triton_server.errors import ServerError
from backend.triton_server.model_config import Instances, seconds_to_load
from backend.triton_server.server_log import LogNews, failure_reason
from backend.triton_server.staging import (
    MODEL_NAME,
    MODEL_REPOSITORY,
    bundled,
    server_environment,
    stage_backend,
    stage_model,
)

POLL_INTERVAL_S = 0.1
_START_S = 60.0  # of the server itself
_KILL_TIMEOUT_S = 2.0  # after exit_timeout_s; a server with an open gRPC stream gives up then, but does not exit


class TritonServer:
    """A running server with one model, stopped when the `with` block ends. Entering waits until the model is ready; `start` and
    `is_ready` do the same for who waits for several.

    A port of 0 becomes a free one. `engine_dir` None keeps the one of config.pbtxt; `parameters` replaces others of its
    parameters, `instances` its instance group. `gpus`: the only ones that the server sees, counted among those that this
    process sees (ServerError if there are not so many); the first is number 0 for `instances`. A model may take its
    load_timeout_s to load, one instance after the other; a request may go on for `exit_timeout_s` after the stop began.
    `report` is called with what is told, a line at a time: where the log is, how far loading is, and, when `check_alive` is
    called, that a worker died or the model unloads itself. However this process ends, the server's do, too.
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
        gpus: Sequence[int] = (),
        exit_timeout_s: int = 10,
        report: Callable[[str], None] = lambda line: None,
    ):
        self._model_dir = Path(os.path.realpath(model_repository), MODEL_NAME)
        self._parameters = dict(parameters or {})
        self._instances, self._gpus = instances, gpus
        self._environment = server_environment(gpus)
        if engine_dir is not None:
            self._parameters["engine_dir"] = os.path.realpath(engine_dir)
        self._host = host
        self._ports = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
        self._exit_timeout_s = exit_timeout_s
        self._report = report
        self._process: subprocess.Popen | None = None
        self._guard: GroupGuard | None = None
        self._staging: Path | None = None
        self._news: LogNews | None = None
        self._seconds_to_load = self._late_at_s = 0.0
        self._killed_at_s: float | None = None  # if it has not ended by then; None: it has not been told to

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
        """The server's log; it exists while the server runs, and after errors."""
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
        try:
            self.start()
            while not self.is_ready():
                time.sleep(POLL_INTERVAL_S)
        except BaseException as error:
            self.stop(keep_logs=isinstance(error, Exception))
            raise
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        self.stop(keep_logs=isinstance(error, Exception))

    def start(self) -> None:
        """Starts the processes and does not wait for the model. Raises ServerError. `stop` has to follow in any case."""
        _check_environment()
        self._staging = Path(tempfile.mkdtemp(prefix="diffusiongemma_server_"))
        self._news = LogNews(self.log_path)
        stage_backend(self._staging / "backends" / "python")
        config = stage_model(self._model_dir, self._staging / "models" / MODEL_NAME, self._parameters, self._instances)
        self._choose_addresses()
        self._start()
        self._seconds_to_load = seconds_to_load(config) + _START_S
        self._late_at_s = time.monotonic() + self._seconds_to_load
        self._report(f"starting  log {self.log_path}")

    def is_ready(self) -> bool:
        """Whether the model is. Raises ServerError, with the reason, when the server has ended or the model is late."""
        self.check_alive()
        if self._answers_ready():
            self.check_alive()
            return True
        if time.monotonic() > self._late_at_s:
            line = self.log_path.read_text().strip().rpartition("\n")[2]
            late = f"model {MODEL_NAME}: not ready after {self._seconds_to_load:g} s"
            raise ServerError(f"{late}; its log {self.log_path} ends with: {line}")
        return False

    def check_alive(self) -> None:
        """Reports what is new in the log. Raises ServerError with the reason from it if the server is no longer running."""
        self._report_news()
        if self._process.poll() is not None:
            reason = failure_reason(self.log_path.read_text(), self._gpus)
            ended = how_ended(self._process.returncode)
            raise ServerError(f"tritonserver {ended}: {reason}; its log is {self.log_path}")

    def begin_to_stop(self) -> None:
        """Has the server refuse new requests and end those under way, without waiting for it; `stop` has to follow."""
        if self._process is not None and self._killed_at_s is None:
            self._process.terminate()
            self._killed_at_s = time.monotonic() + self._exit_timeout_s + _KILL_TIMEOUT_S

    def stop(self, *, keep_logs: bool = False) -> None:
        """Ends the server, its stubs and its shared memory, and removes the staging directory. May be called again.

        A log that tells of errors is kept and reported in any case.
        """
        try:
            if self._process is not None:
                self._end_processes()
        finally:
            if self._staging is not None:
                for region in Path("/dev/shm").glob(f"{self.shm_prefix}*"):
                    region.unlink(missing_ok=True)
                self._report_news()
                if self._news.tells_of_errors and not keep_logs:
                    self._report(f"the log tells of errors and is kept: {self.log_path}")
                _remove(self._staging, keep_logs=keep_logs or self._news.tells_of_errors)

    def _choose_addresses(self) -> None:
        try:
            self._host = ipv4_address(self._host)
            chosen = free_ports(self._host, [(f"--{name}-port", port) for name, port in self._ports.items()])
        except AddressError as error:
            raise ServerError(str(error)) from None
        self._ports = dict(zip(self._ports, chosen, strict=True))

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
        if not is_loopback(self._host):
            # As deploy/start.sh: whoever may load models may have the server run code. The key is told nobody there.
            closed = f"model-repository,shared-memory,trace,logging:closed={secrets.token_hex(16)}"
            arguments |= {"http-restricted-api": closed, "grpc-restricted-protocol": closed}
        options = [f"--{name}={value}" for name, value in arguments.items()]
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [bundled("bin/tritonserver"), "--disable-auto-complete-config", *options],
                env=self._environment | {"TMPDIR": str(self._staging)},  # programs are unpacked there
                cwd=self._staging,  # the stub puts its working directory first on sys.path
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us, and a group can be killed whole
            )
        self._guard = GroupGuard(self._process.pid, self._environment)

    def _report_news(self) -> None:
        for line in self._news.next():
            self._report(line)

    def _answers_ready(self) -> bool:
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
            self.begin_to_stop()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, self._killed_at_s - time.monotonic()))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # a killed or crashed server leaves its stubs behind
            self._process.wait()
            if self._guard is not None:
                self._guard.close()


def _check_environment() -> None:
    numpy_version = importlib.metadata.version("numpy")
    if int(numpy_version.split(".")[0]) >= 2:
        raise ServerError(f"numpy: got {numpy_version}, expected below 2, or the bundled server aborts; pip install 'numpy<2'")


def _remove(directory: Path, *, keep_logs: bool) -> None:
    """keep_logs: all but the files that end in .log, if there are any."""
    if not keep_logs or not any(directory.glob("*.log")):
        shutil.rmtree(directory, ignore_errors=True)
        return
    for each in directory.iterdir():
        if each.is_dir():
            shutil.rmtree(each, ignore_errors=True)
        elif each.suffix != ".log":
            each.unlink()


def leave_on_signals(farewell: str = "") -> None:
    """SIGINT, SIGTERM and a terminal that is closed leave `with` blocks, after a line on standard error; under nohup the last
    does nothing."""

    def leave(*_) -> None:
        if farewell:
            with suppress(OSError):  # a terminal that is closed
                os.write(2, f"{farewell}\n".encode())  # print is not for signal handlers
        sys.exit(0)

    numbers = [signal.SIGINT, signal.SIGTERM]  # both, for who starts it in the background of a shell gets SIGINT ignored
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, leave)
