"""What `python -m backend` refuses and says before anything is loaded."""

import io
import re
import socket
import sys

import pytest
from sparse_checkpoint import SHAPE_26B
from typer.testing import CliRunner

from backend.__main__ import app, main
from builder.build import write_manifest
from contract.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    """The manifest of an engine of the 26B shape."""
    directory = tmp_path_factory.mktemp("plan") / "26b"
    write_manifest(SHAPE_26B, directory, report=lambda line: None)
    return str(directory)


def refused(*arguments: str) -> str:
    """The one line of a command that is refused."""
    result = CliRunner().invoke(app, arguments)
    [line] = result.output.splitlines()
    assert result.exit_code == 1 and line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture
def never_started(monkeypatch):
    """No server, no front end; and signals are this process's."""

    def start(*_, **__):
        raise AssertionError("something was started")

    monkeypatch.setattr("backend.__main__.leave_on_signals", lambda _: None)
    monkeypatch.setattr("backend.serving.TritonServer", start)
    monkeypatch.setattr("backend.openai_server.serve.serve", start)


@pytest.mark.parametrize("option", ["--grpc-port", "--http-port", "--metrics-port", "--openai-port"])
def test_serve_looks_at_every_port_before_it_starts_anything(option, never_started):
    others = [word for name in ("grpc", "http", "metrics", "openai") for word in (f"--{name}-port", "0")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = refused("serve", *others, option, port)
    reason = f"127.0.0.1:{port} cannot be used (Address already in use)"
    assert line == f"{option}: {reason}; pass another {option}, or 0"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["serve", "--set", "max_sequences"], "--set: got 'max_sequences', expected NAME=VALUE, such as max_sequences=8"),
        (["config", "--set", "\udcff=1"], r"--set: got '\udcff=1', expected NAME=VALUE, such as max_sequences=8"),
        (["serve", "--set", "foo=1"], "--set: got the unknown parameter foo, expected some of engine_dir, "),
        (["config", "--set", "foo=1"], "--set: got the unknown parameter foo, expected some of engine_dir, "),
        (["serve", "--set", "max_queued=-1"], "--set: parameter max_queued: got '-1', expected a whole number of at least 0"),
        (
            ["serve", "--host", "203.0.113.1", "--grpc-port", "0"],
            "--host: got 203.0.113.1, expected an address of this machine",
        ),
        (["serve", "--api-key-file", "/nope"], "--api-key-file: /nope cannot be read (No such file or directory), expected"),
        (["openai", "--api-key-file", "/nope"], "--api-key-file: /nope cannot be read (No such file or directory), expected"),
        (["serve", "--allowed-origin", "https://a.example/"], "--allowed-origin: got 'https://a.example/', expected scheme://"),
        (["openai", "--allowed-origin", ""], "--allowed-origin: got '', expected scheme://host or scheme://host:port"),
        (["openai", "--triton", "localhost"], "--triton: got 'localhost', expected host:port, such as localhost:8001"),
        (["openai", "--triton", "a:1", "--triton", "b"], "--triton: got 'b', expected host:port, such as localhost:8001"),
        (
            ["openai", "--triton", "a:1", "--triton", "b:1", "--triton", "a:1"],
            "--triton: got a:1 twice, expected each server once; remove one",
        ),
        (
            ["openai", "--triton", "a:1", "--triton", "b:1", "--triton-metrics", "http://a:2/metrics"],
            "--triton-metrics: got http://a:2/metrics beside 2 of --triton, expected it beside one; leave it out, and scrape "
            "/metrics of each server",
        ),
        (["openai", "--triton-metrics", "nonsense"], "--triton-metrics: got 'nonsense', expected a URL such as http://"),
    ],
)
def test_options_are_named(arguments, line, never_started):
    assert refused(*arguments).startswith(line)


@pytest.mark.parametrize("arguments", [["generate", "--engine", "e", "x"], ["chat", "--engine", "e"]], ids=["generate", "chat"])
def test_a_checkpoints_problems_are_a_line_each(arguments, monkeypatch):
    def broken(*_, **__):
        raise CheckpointError("a.safetensors: missing\nb\x1b.safetensors: missing")

    monkeypatch.setattr("backend.LLM", broken)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.output == "error: a.safetensors: missing\nerror: b\\x1b.safetensors: missing\n"


@pytest.mark.parametrize("command", ["plan", "generate", "chat"])
def test_any_path_is_told_of_in_one_line(command, tmp_path):
    engine = str(tmp_path / "a\n\x1bb")
    arguments = {"plan": [engine, "--memory", "80GB"], "generate": ["--engine", engine, "x"], "chat": ["--engine", engine]}
    line = refused(command, *arguments[command])
    assert line.startswith(rf"{tmp_path}/a\n\x1bb/manifest.json: no such file; expected an engine directory; build")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--memory", "80"], "--memory: got '80', which is 80 bytes, expected a unit too, such as 80GB or 79.6GiB"),
        (["--memory", "much"], "--memory: got 'much', expected a size such as 80GB, 79.6GiB or a number of bytes"),
        (["--memory", "0.5"], "--memory: got '0.5', expected a size such as 80GB, 79.6GiB or a number of bytes"),
        (["--memory", "40GB"], "--memory: got 40.00 GB, expected at least "),
        (
            ["--memory", "80GB", "--length", "300000"],
            "--length: got 300000, expected at most 262144, the positions of the model",
        ),
    ],
)
def test_options_of_a_plan_are_named(plain, arguments, line):
    assert refused("plan", plain, *arguments).startswith(line)


def test_a_plan_says_which_server_each_of_its_numbers_is_about(plain):
    arguments = ["plan", plain, "--memory", "80GB", "--device", "cuda", "--max-sequences", "64", "--length", "8192"]
    lines = CliRunner().invoke(app, arguments).stdout.splitlines()
    assert lines[0] == "with --set max_sequences=64 --set memory_bytes=80000000000:"
    assert [line.split()[0] for line in lines[1:3]] == ["memory", "fits"]
    assert lines[3] == "the most of each length, with max_sequences set to just that many:"


def test_the_front_end_says_that_nothing_answers_yet_and_starts(monkeypatch):
    started = []
    monkeypatch.setattr("backend.openai_server.serve.serve", started.append)
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = server.getsockname()[1]
        options = ["--triton", f"127.0.0.1:{there}", "--triton-metrics", "http://127.0.0.1:1/metrics"]
        result = CliRunner().invoke(app, ["openai", *options])
    assert result.exit_code == 0 and len(started) == 1
    assert result.output == "--triton-metrics: nothing answers at http://127.0.0.1:1/metrics yet; starting all the same\n"


def test_the_introduction_names_every_command():
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    introduction = shown.partition("Options")[0]
    assert set(re.findall(r"`(?:python -m backend )?(\w+)`", introduction)) == commands


def test_a_terminal_that_is_not_utf_8_gets_question_marks(monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="latin-1") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["backend", "serve", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    streams["stdout"].flush()
    assert ended.value.code == 0 and b"0,1,?" in streams["stdout"].buffer.getvalue()
