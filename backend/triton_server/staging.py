"""What a server that is started here runs from: the files of the `nvidia-pytriton` wheel, and a model with other parameters.

backends/python/    links: the Python backend, and its stub for the running Python
models/NAME/        config.pbtxt with this start's parameters; the version folders are links to the model repository
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from backend.triton_server.errors import ServerError
from backend.triton_server.model_config import Instances, ModelConfigError, changed_config

MODEL_NAME = "diffusiongemma"
MODEL_REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"


def stage_backend(directory: Path) -> None:
    """Makes `directory` a Python backend of links into the wheel, with the stub of the running Python.

    Raises ServerError if a shared library of the stub is missing: the server would find out only after two minutes.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = bundled(f"python_backend_stubs/{version}/triton_python_backend_stub")
    directory.mkdir(parents=True)
    shared = [bundled(f"backends/python/{name}") for name in ("libtriton_python.so", "triton_python_backend_utils.py")]
    for file in (stub, *shared):
        (directory / file.name).symlink_to(file)
    listing = subprocess.run(["ldd", stub], env=server_environment(), capture_output=True, text=True, check=True).stdout
    missing = [line.split()[0] for line in listing.splitlines() if "not found" in line]
    if missing:
        where = sysconfig.get_config_var("LIBDIR")
        raise ServerError(
            f"Python backend: shared libraries {missing} not found, expected in {where}; install Python's shared library"
        )


def stage_model(source: Path, target: Path, parameters: Mapping[str, str], instances: Instances | None = None) -> str:
    """Makes `target` the model in `source` with other `parameters` and `instances`, and returns its config.pbtxt. A relative
    engine_dir still starts at `source`.

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
    return text


def bundled(path: str) -> Path:
    spec = importlib.util.find_spec("pytriton")
    if spec is None:
        raise ServerError(
            "tritonserver: the package nvidia-pytriton that carries it is not installed; pip install nvidia-pytriton"
        )
    file = Path(spec.submodule_search_locations[0]) / "tritonserver" / path
    if not file.is_file():
        raise ServerError(f"tritonserver: nvidia-pytriton has no {path}; expected a release for this Python and platform")
    return file


def server_environment(gpus: Sequence[int] = ()) -> dict[str, str]:
    """The server's environment: the stub finds this very Python, its shared library, and this very package.

    gpus: the only ones that the server is to see, counted among those that this process sees; none: all. Raises ServerError if
    there are not so many.
    """
    first = {
        "PATH": str(Path(sys.executable).parent),
        "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR") or "",
        "PYTHONPATH": str(MODEL_REPOSITORY.parent),
    }
    paths = {name: os.pathsep.join(filter(None, (path, os.environ.get(name)))) for name, path in first.items()}
    return os.environ | paths | ({"CUDA_VISIBLE_DEVICES": ",".join(map(_visible, gpus))} if gpus else {})


def _visible(gpu: int) -> str:
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        return str(gpu)
    if not seen.strip():  # CUDA's way of saying that none is visible
        expected = "expected none, because CUDA_VISIBLE_DEVICES is empty"
        raise ServerError(f"--gpus: got {gpu}, {expected}; unset it, or remove --gpus")
    devices = seen.split(",")
    if gpu >= len(devices):
        expected = f"expected at most {len(devices) - 1}, because CUDA_VISIBLE_DEVICES is {seen}"
        raise ServerError(f"--gpus: got {gpu}, {expected}; pass other numbers")
    return devices[gpu].strip()
