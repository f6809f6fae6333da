"""What `python -m backend serve` starts: one server, or one a GPU, their ports and what the front end is told of them."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from backend import serving
from backend.__main__ import app
from backend.addresses import AddressError
from backend.openai_server import launch
from backend.openai_server.launch import FrontEndError
from backend.openai_server.settings import OpenAISettings
from backend.triton_server import launch as triton_launch
from backend.triton_server.errors import ServerError
from backend.triton_server.model_config import Instances
from backend.triton_server.staging import server_environment

HOST = "127.0.0.1"
PORTS = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}


class Stop(Exception):
    """Ends what would serve until a signal."""


class Started:
    """In the place of servers and of the front end. all: those that were started, in order; events: what became of them."""

    all: list["Started"]
    events: list[str]

    def start(self) -> None:
        self.number = len(Started.all)
        Started.all.append(self)
        self.note("started")

    def note(self, event: str) -> None:
        Started.events.append(f"{self.number} {event}")

    def __enter__(self) -> "Started":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.note("ended")

    def check_alive(self) -> None:
        raise Stop


class Server(Started):
    grpc_url = property(lambda self: f"a:{self.number}")
    http_url = property(lambda self: f"http://a:{self.number}")
    metrics_url = property(lambda self: f"http://a:{self.number}/metrics")
    log_path = property(lambda self: Path(f"/s{self.number}/server.log"))

    def __init__(self, **options):
        self.options, self.looks = options, 0

    def is_ready(self) -> bool:
        self.looks += 1
        if self.looks == 2:
            self.note("ready")
        return self.looks == 2

    def begin_to_stop(self) -> None:
        self.note("stopping")


class FrontEnd(Started):
    url = "http://a:9"

    def __init__(self, settings: OpenAISettings, log_path: Path):
        self.settings, self.log_path = settings, log_path

    def check_alive(self) -> None:
        pass


@pytest.fixture
def served(monkeypatch, capsys):
    """(what was started, the line of standard output) of `serve` with these options."""
    Started.all, Started.events = [], []
    monkeypatch.setattr(serving, "TritonServer", Server)
    monkeypatch.setattr(serving, "FrontEnd", FrontEnd)

    def serve(*arguments: object, **options: object) -> tuple[list[Started], str]:
        with pytest.raises(Stop):
            serving.serve(*arguments, **({"host": HOST, "ports": PORTS, "report": print} | options))
        assert sorted(each for each in Started.events if "ended" in each) == [f"{each.number} ended" for each in Started.all]
        return Started.all, capsys.readouterr().out

    return serve


def test_with_the_front_end_each_gpu_has_a_server(served):
    (*servers, front_end), line = served(OpenAISettings(port=0), replicas=2, gpu_groups=[(0,), (3,)], engine_dir="e")
    assert [server.options["gpus"] for server in servers] == [(0,), (3,)]
    assert all(server.options["instances"] == Instances(count=2, gpus=(0,)) for server in servers)
    assert all(server.options["engine_dir"] == "e" for server in servers)
    ports = {server.options[name] for server in servers for name in PORTS} | {front_end.settings.port}
    assert len(ports) == 7 and 0 not in ports
    assert (front_end.settings.triton_urls, front_end.settings.triton_metrics_url) == (("a:0", "a:1"), None)
    assert line == (
        "ready  gRPC a:0,a:1  HTTP http://a:0,http://a:1  metrics http://a:0/metrics,http://a:1/metrics  "
        "OpenAI http://a:9/v1  log /s0/server.log,/s1/server.log  OpenAI log /s0/openai.log\n"
    )


def test_one_gpu_has_a_server_whose_metrics_the_front_end_passes_on(served):
    told = []
    (server, front_end), _ = served(OpenAISettings(port=0), gpu_groups=[(1,)], report=told.append)
    assert (server.options["gpus"], server.options["instances"]) == ((1,), Instances(gpus=(0,)))
    assert front_end.settings.triton_metrics_url == "http://a:0/metrics"
    server.options["report"]("starting")
    assert told == ["GPU 1: starting"]


@pytest.mark.parametrize("openai", [OpenAISettings(port=0), None], ids=["with the front end", "without"])
def test_gpus_that_an_engine_needs_together_have_a_server(openai, served):
    told = []
    started, _ = served(openai, replicas=2, gpu_groups=[(0, 1), (3, 2)], report=told.append)
    servers = [each for each in started if isinstance(each, Server)]
    assert [server.options["gpus"] for server in servers] == [(0, 1), (3, 2)]
    # Without gpus: the workers see all that their server sees.
    assert all(server.options["instances"] == Instances(count=2) for server in servers)
    for server in servers:
        server.options["report"]("starting")
    assert told[-2:] == ["GPU 0+1: starting", "GPU 3+2: starting"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gpus", "0,1"], (None, [(0,), (1,)])),
        (["--gpus", "4+5,2+3", "--instances", "2"], (2, [(4, 5), (2, 3)])),
        ([], (None, [])),
    ],
    ids=str,
)
def test_the_command_groups_gpus(words, expected, monkeypatch):
    given = {}
    monkeypatch.setattr(serving, "serve", lambda _, **options: given.update(options))
    monkeypatch.setattr("backend.__main__.leave_on_signals", lambda _: None)  # they are this process's
    result = CliRunner().invoke(app, ["serve", "--engine", "e", *words])
    assert result.exit_code == 0, result.output
    assert (given["replicas"], given["gpu_groups"]) == expected


@pytest.mark.parametrize(
    ("command", "gpus", "message"),
    [
        ("serve", "0+", "--gpus: got '0+', expected numbers and commas like 0,1"),
        ("serve", "0+1,1+2", "--gpus: got 1 twice, expected each GPU once"),
        ("config", "0,1+2", "--gpus: got 1+2, expected single GPUs: a worker of one model sees one, or all"),
    ],
)
def test_groups_that_cannot_be(command, gpus, message, monkeypatch):
    monkeypatch.setattr("backend.__main__.leave_on_signals", lambda _: None)
    result = CliRunner().invoke(app, [command, "--gpus", gpus])
    [line] = result.stderr.splitlines()
    assert result.exit_code == 1 and line.startswith(f"error: {message}")


def test_servers_load_and_stop_at_once_and_the_front_end_outlasts_them(served):
    served(OpenAISettings(port=0), gpu_groups=[(0,), (3,)])
    loaded = ["0 started", "1 started", "2 started", "0 ready", "1 ready"]
    assert Started.events == [*loaded, "0 stopping", "1 stopping", "1 ended", "0 ended", "2 ended"]


@pytest.mark.parametrize("loaded", [[], ["0 ready"]], ids=["while an engine loads", "as it is loaded"])
def test_a_front_end_that_dies_before_all_is_ready(loaded, served, monkeypatch):
    def check_alive(_) -> None:
        if "1 started" in Started.events and set(loaded) <= set(Started.events):
            raise Stop

    monkeypatch.setattr(FrontEnd, "check_alive", check_alive)
    assert served(OpenAISettings(port=0))[1] == ""
    assert [event for event in Started.events if "ready" in event] == loaded


def test_what_a_server_of_a_gpu_reports_says_which(served):
    told = []
    (first, second, _), _ = served(OpenAISettings(port=0), gpu_groups=[(0,), (3,)], report=told.append)
    first.options["report"]("starting")
    second.options["report"]("starting")
    assert told == ["GPU 0: starting", "GPU 3: starting"]


@pytest.mark.parametrize(
    ("openai", "options", "instances"),
    [
        (OpenAISettings(port=0), {}, None),
        (OpenAISettings(port=0), {"replicas": 3}, Instances(count=3)),
        (None, {"gpu_groups": [(0,), (1,)]}, Instances(gpus=(0, 1))),
        (None, {"replicas": 2, "gpu_groups": [(3,)]}, Instances(count=2, gpus=(3,))),
    ],
    ids=["as config.pbtxt says", "replicas", "without the front end", "and one GPU"],
)
def test_otherwise_there_is_one_server(openai, options, instances, served):
    (server, *front_ends), _ = served(openai, **options)
    assert server.options["instances"] == instances and "gpus" not in server.options
    assert [(each.settings.triton_urls, each.settings.triton_metrics_url) for each in front_ends] == (
        [(("a:0",), "http://a:0/metrics")] if openai else []
    )


def test_further_servers_have_ports_that_are_10_higher(monkeypatch):
    monkeypatch.setattr(serving, "free_ports", lambda host, ports: [port for _, port in ports])
    ports = {"grpc_port": 8001, "http_port": 0}
    chosen = serving.chosen_ports(HOST, ports, 3, 9000)
    assert chosen == ([{"grpc_port": port, "http_port": 0} for port in (8001, 8011, 8021)], 9000)
    assert serving.chosen_ports(HOST, ports, 1, None) == ([ports], None)


def test_a_port_that_leaves_no_room_for_the_others():
    with pytest.raises(AddressError) as raised:
        serving.chosen_ports(HOST, {"grpc_port": 65530}, 2, None)
    expected = "expected at most 65525 for 2 servers, whose ports are 10 apart"
    assert str(raised.value) == f"--grpc-port: got 65530, {expected}; pass a lower one, or 0"


def test_a_server_sees_the_gpu_that_is_meant(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in server_environment()
    assert server_environment([3])["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-5")
    assert server_environment()["CUDA_VISIBLE_DEVICES"] == "4, GPU-5"
    assert [server_environment(gpus)["CUDA_VISIBLE_DEVICES"] for gpus in ([0], [1], [1, 0])] == ["4", "GPU-5", "GPU-5,4"]
    with pytest.raises(ServerError) as raised:
        server_environment([0, 2])
    expected = "expected at most 1, because CUDA_VISIBLE_DEVICES is 4, GPU-5"
    assert str(raised.value) == f"--gpus: got 2, {expected}; pass other numbers"


def test_where_no_gpu_is_visible_a_server_sees_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert server_environment()["CUDA_VISIBLE_DEVICES"] == ""
    with pytest.raises(ServerError) as raised:
        server_environment([1])
    expected = "expected none, because CUDA_VISIBLE_DEVICES is empty"
    assert str(raised.value) == f"--gpus: got 1, {expected}; unset it, or remove --gpus"


def test_a_gpu_beyond_those_that_are_visible_is_refused_before_anything_starts(monkeypatch):
    def start(_) -> None:
        raise AssertionError("a server was started")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    monkeypatch.setattr("backend.triton_server.launch.TritonServer.__enter__", start)
    with pytest.raises(ServerError, match="--gpus: got 1, expected at most 0, because CUDA_VISIBLE_DEVICES is 4; pass other"):
        serving.serve(OpenAISettings(port=0), host=HOST, ports=PORTS, gpu_groups=[(0,), (1,)], report=print)


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]*"))), reason="for a machine without a GPU")
def test_a_gpu_that_is_not_there_is_named_as_it_was_given(engine_dir, monkeypatch):
    monkeypatch.setattr("backend.__main__.leave_on_signals", lambda _: None)  # they are this process's
    free = [word for name in ("grpc", "http", "metrics", "openai") for word in (f"--{name}-port", "0")]
    result = CliRunner().invoke(app, ["serve", "--engine", str(engine_dir), "--gpus", "1,0", *free])
    *told, error = result.output.splitlines()
    assert [re.sub(r" \S+$", "", each) for each in told] == ["GPU 1: starting  log", "GPU 0: starting  log"]
    assert result.exit_code == 1
    expected = "expected a GPU that Triton can use here; pass others, or leave it out"
    assert re.fullmatch(rf"error: tritonserver ended with exit code \d+: --gpus: got 1, {expected}; its log is \S+", error)


@pytest.fixture
def front_end(tmp_path, monkeypatch) -> Callable[[str], launch.FrontEnd]:
    """One whose process is that of a shell, which says its address and goes on so."""

    def made(script: str) -> launch.FrontEnd:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o700)
        monkeypatch.setattr(launch.sys, "executable", str(program))
        return launch.FrontEnd(OpenAISettings(), tmp_path / "openai.log")

    return made


ADDRESS = "echo 'ready  OpenAI API http://a:1/v1'"
NOTE = "echo '--triton: nothing answers yet; starting all the same' >&2"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (f"{ADDRESS}; {NOTE}", ""),
        (ADDRESS, ""),
        (f"echo 'error: --port: taken' >&2; {NOTE}", ": --port: taken"),
    ],
)
def test_only_an_error_is_why_the_front_end_ended(said, reason, front_end, tmp_path):
    with pytest.raises(FrontEndError) as raised, front_end(f"{said}; exit 3") as started:
        while True:
            started.check_alive()
            time.sleep(0.01)
    assert str(raised.value) == f"OpenAI front end ended with exit code 3{reason}; its log is {tmp_path / 'openai.log'}"


def test_a_second_signal_ends_a_front_end_that_is_waited_for(front_end, monkeypatch):
    with front_end(f"trap '' TERM; {ADDRESS}; exec sleep 60") as started:
        process, wait = started._process, started._process.wait

        def waiting(timeout: float | None = None) -> int:
            if timeout is not None:
                raise SystemExit  # what `leave_on_signals` does
            return wait()

        monkeypatch.setattr(process, "wait", waiting)
        with pytest.raises(SystemExit):
            started.stop()
        assert process.returncode == -signal.SIGKILL


def test_the_time_that_a_server_has_to_end_is_from_when_it_was_told(monkeypatch):
    """Of several, which are waited for one by one."""
    clock, waited, told = SimpleNamespace(monotonic=lambda: clock.now_s, now_s=100.0), [], []
    server = triton_launch.TritonServer(exit_timeout_s=10)
    monkeypatch.setattr(triton_launch, "time", clock)
    monkeypatch.setattr(triton_launch.os, "killpg", lambda *_: None)
    process = {"terminate": lambda: told.append(clock.now_s), "wait": lambda timeout=None: waited.append(timeout)}
    server._process = SimpleNamespace(pid=1, **process)
    server.begin_to_stop()
    for clock.now_s in (109.0, 130.0):
        server.stop()
    assert (told, waited) == ([100.0], [3.0, None, 0.0, None])
