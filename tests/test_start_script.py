"""The start script of the container image, run with the bundled server on the tiny engine."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import tritonclient.grpc as grpcclient
from server_clients import NO_PROXY, QUESTION, ask_once
from server_processes import engine_workers, leftovers, stubs
from tritonclient.utils import InferenceServerException
from waiting import TIMEOUT_S, wait_until

from backend.triton_server.staging import MODEL_NAME, MODEL_REPOSITORY, stage_backend, stage_model

ROOT = Path(__file__).parent.parent
READY = f"/v2/models/{MODEL_NAME}/ready"  # what the probes of deploy/ ask
BUNDLED = Path(importlib.util.find_spec("pytriton").submodule_search_locations[0]) / "tritonserver" / "bin"


@pytest.fixture
def server(engine_dir, tmp_path):
    """A copy of the script beside a repository whose model gives up at the first death of its worker."""
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy" / "start.sh", tmp_path / "deploy")
    parameters = {"engine_dir": str(engine_dir), "max_worker_deaths": "1"}
    stage_model(MODEL_REPOSITORY / MODEL_NAME, tmp_path / "model_repository" / MODEL_NAME, parameters)
    stage_backend(tmp_path / "backends" / "python")
    name, ports = f"start_script_{os.getpid()}", dict(zip(("grpc", "http", "metrics"), free_ports(3), strict=True))
    addresses = [f"--{each}-port={port}" for each, port in ports.items()] + [f"--{each}-address=127.0.0.1" for each in ports]
    options = [f"--backend-directory={tmp_path / 'backends'}", f"--backend-config=python,shm-region-prefix-name={name}"]
    first = {"PATH": f"{BUNDLED}:{Path(sys.executable).parent}", "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR")}
    environment = os.environ | {key: f"{path}:{os.environ.get(key, '')}" for key, path in first.items()}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [tmp_path / "deploy" / "start.sh", *options, *addresses],
            env=environment | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    yield SimpleNamespace(process=process, pid=process.pid, name=name, **ports)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for region in Path("/dev/shm").glob(f"{name}*"):
        region.unlink()


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def status(server, path: str, method: str = "GET") -> int | None:
    """None while nobody listens."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.http}{path}", method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=TIMEOUT_S) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        assert server.process.poll() is None, "the server has ended"
        return None


def test_the_model_serves_cannot_be_touched_and_unloads_itself(server):
    wait_until(lambda: status(server, READY) == 200)
    url = f"127.0.0.1:{server.grpc}"
    assert ask_once(url, text_input=QUESTION, max_tokens=1).num_output_tokens == 1

    for path in ("models/diffusiongemma/unload", "models/diffusiongemma/load", "index"):
        assert status(server, f"/v2/repository/{path}", "POST") == 403
    with grpcclient.InferenceServerClient(url, channel_args=NO_PROXY) as client:
        for call in (client.get_model_repository_index, client.get_trace_settings, client.get_log_settings):
            with pytest.raises(InferenceServerException, match="restricted"):
                call()
        with pytest.raises(InferenceServerException, match="restricted"):
            client.unload_model("diffusiongemma")
        assert client.is_model_ready("diffusiongemma")

    (worker,) = engine_workers(server)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: status(server, READY) == 400)
    wait_until(lambda: not stubs(server))
    wait_until(lambda: status(server, "/v2/health/ready") == 200)  # which fails only until the model is unloaded
    assert status(server, READY) == 400

    server.process.terminate()
    assert server.process.wait(TIMEOUT_S) == 0
    assert leftovers(server.name) == []
