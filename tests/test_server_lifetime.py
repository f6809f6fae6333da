"""Starting and stopping the real Triton server, and what is left of it."""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest
import tritonclient.grpc as grpcclient
from openai import OpenAI
from server_clients import ANY_PORTS, ENDLESS, NO_PROXY, QUESTION, Refused, Stream, ask_once
from server_processes import engine_workers, leftovers
from tritonclient.utils import InferenceServerException
from waiting import wait_until

from backend.triton_server.launch import MODEL_REPOSITORY, ServerError, TritonServer
from backend.triton_server.model_config import Instances


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_cleanly(engine_dir, stop):
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", "--openai-port", "0"]
    command = [sys.executable, "-m", "backend", "serve", "--engine", str(engine_dir), "--host", "localhost", *ports]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, cwd=MODEL_REPOSITORY.parent) as process:
        starting = process.stderr.readline().removesuffix("\n")
        assert starting.startswith("starting  log ")  # while it loads
        line = process.stdout.readline()
        ready = re.fullmatch(r"ready  gRPC (\S+)  HTTP \S+  metrics \S+  OpenAI (\S+)  log (\S+)  OpenAI log (\S+)\n", line)
        url, openai_url, log, openai_log = ready.groups()
        assert starting == f"starting  log {log}"
        assert Path(log).is_file() and Path(openai_log).is_file() and Path(openai_log).parent == Path(log).parent
        assert ask_once(url, text_input=QUESTION, max_tokens=1).num_output_tokens == 1
        with OpenAI(base_url=openai_url, api_key="any") as client:
            assert client.completions.create(model="diffusiongemma", prompt=QUESTION, max_tokens=1).usage.completion_tokens == 1
        name = Path(log).parent.name
        assert len(leftovers(name)) > 2  # the server, its stub, and files
        process.send_signal(stop)
        *told, farewell = process.stderr.read().splitlines()
        assert [each.split()[0] for each in told] == ["memory", "fits"]
        assert farewell == "stopping; requests under way have a few seconds"
    assert process.returncode == 0
    assert leftovers(name) == []
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(openai_url.split(":")[2].split("/")[0])), timeout=1).close()


def test_what_serve_started_ends_with_it_when_it_is_killed(engine_dir):
    command = [sys.executable, "-m", "backend", "serve", "--engine", str(engine_dir)]
    command += [word for name in ("grpc", "http", "metrics", "openai") for word in (f"--{name}-port", "0")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=MODEL_REPOSITORY.parent) as process:
        log = Path(re.search(r"  log (\S+)", process.stdout.readline())[1])
        name = log.parent.name
        assert len(leftovers(name)) > 2
        process.kill()
        process.wait()
        wait_until(lambda: all(each == str(log.parent) or each.startswith("/dev/shm/") for each in leftovers(name)))
        assert process.stdout.read() == ""
    for path in Path("/dev/shm").glob(f"{name}*"):
        path.unlink()
    shutil.rmtree(log.parent)


def test_serve_without_the_front_end_does_not_want_its_port(engine_dir):
    """And stops as cleanly when its terminal is closed."""
    command = [sys.executable, "-m", "backend", "serve", "--engine", str(engine_dir)]
    command += ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command += ["--openai-port", str(taken.getsockname()[1]), "--no-openai"]
        # Whatever these tests were started under: nohup ignores SIGHUP.
        at_first = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=MODEL_REPOSITORY.parent, **at_first) as process:
            ready = process.stdout.readline()
            process.send_signal(signal.SIGHUP)
        assert process.returncode == 0 and "OpenAI" not in ready
        assert leftovers(Path(re.search(r"  log (\S+)", ready)[1]).parent.name) == []


def test_whoever_reaches_an_open_server_may_ask_it_but_not_load_models(engine_dir, monkeypatch):
    """Loading models is running code; `test_start_script` has the same of the container."""
    monkeypatch.setattr("backend.triton_server.launch.is_loopback", lambda host: False)
    with TritonServer(engine_dir=engine_dir, **ANY_PORTS) as server:
        url, address = server.grpc_url, server.http_url.removeprefix("http://")
        for path in ("index", "models/diffusiongemma/load", "models/diffusiongemma/unload"):
            with closing(http.client.HTTPConnection(address, timeout=60)) as connection:
                connection.request("POST", f"/v2/repository/{path}", body="{}")
                assert connection.getresponse().status == 403
        with grpcclient.InferenceServerClient(url, channel_args=NO_PROXY) as client:
            for call in (client.get_model_repository_index, client.get_trace_settings, client.get_system_shared_memory_status):
                with pytest.raises(InferenceServerException, match="restricted"):
                    call()
        assert ask_once(url, text_input=QUESTION, max_tokens=1).num_output_tokens == 1


def test_a_stop_does_not_wait_for_long_requests(engine_dir):
    with TritonServer(engine_dir=engine_dir, exit_timeout_s=1, **ANY_PORTS) as server:
        stream = Stream(server.grpc_url, text_input=QUESTION, stream=True, **ENDLESS)
        next(iter(stream))
        name = server.shm_prefix
    with pytest.raises(Refused):
        list(stream)
    stream.close()
    assert leftovers(name) == []


def test_a_dead_server_is_noticed_and_cleared_away(engine_dir):
    with TritonServer(engine_dir=engine_dir, **ANY_PORTS) as server:
        name = server.shm_prefix
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerError, match="tritonserver ended by SIGKILL"):
            while True:
                server.check_alive()
                time.sleep(0.01)
    assert leftovers(name) == []


def test_deaths_of_workers_are_told_and_their_log_is_kept(engine_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    told: list[str] = []
    parameters = {"max_worker_deaths": "1"}
    with TritonServer(engine_dir=engine_dir, parameters=parameters, report=told.append, **ANY_PORTS) as server:

        def gave_up() -> bool:
            server.check_alive()
            return told[-1].endswith("; unloading the model")

        (worker,) = engine_workers(server)
        os.kill(worker, signal.SIGKILL)
        wait_until(gave_up)
    died, _, kept = told[-3:]
    assert died == "engine worker: ended by SIGKILL; see the server's log"
    assert kept == f"the log tells of errors and is kept: {server.log_path}"
    assert died in server.log_path.read_text()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [server.log_path]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine_dir": "/nowhere/engine"}, ["/nowhere/engine", "manifest.json"]),
        ({"model_repository": "/nowhere"}, ["/nowhere/diffusiongemma", "config.pbtxt", "--model-repository"]),
        ({"parameters": {"max_sequences": "-1"}}, ["max_sequences", "'-1'", "at least 0"]),
        ({"instances": Instances(gpus=(99,))}, ["--gpus: got 99, "]),
        ({"parameters": {"nonsense": "1"}}, ["nonsense", "config.pbtxt"]),
        ({"http_port": None}, ["--http-port", "cannot be used (Address already in use); pass another --http-port"]),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(engine_dir, options, words, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if "http_port" in options:
            options = {"http_port": taken.getsockname()[1]}
        server = TritonServer(**{"engine_dir": engine_dir, **ANY_PORTS, **options})
        with pytest.raises(ServerError) as caught, server:
            pass
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []
    logs = list(tmp_path.rglob("*"))  # all that is left, if the server ran at all
    assert [str(path) for path in logs if path.is_file()] == re.findall(r"; its log is (\S+)$", message)
    assert len(logs) in (0, 2)
