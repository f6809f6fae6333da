"""The settings, config.pbtxt and the tensors' table: each is made from one place, and read back."""

from pathlib import Path

import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup
from typer.testing import CliRunner

from backend.__main__ import app
from backend.engine import EngineLimits
from backend.images.limits import ImageLimits
from backend.triton_server.launch import MODEL_NAME, MODEL_REPOSITORY, TritonServer
from backend.triton_server.model_config import Instances, ModelConfigError, changed_config, config_pbtxt, seconds_to_load
from backend.triton_server.request import READERS
from backend.triton_server.settings import Settings
from backend.triton_server.signature import INPUTS, OUTPUTS

COMMITTED = MODEL_REPOSITORY / MODEL_NAME / "config.pbtxt"
OTHERS = Settings(
    engine_dir='/engines/a "b" \\ ü',
    max_sequences=3,
    max_cached_tokens=1000,
    memory_bytes=0,
    prefix_cache=False,
    commit_last=True,
    max_pass_rows=64,
    cpu_threads=3,
    max_queued=0,
    queue_timeout_s=1.25,
    draft_interval_s=0.5,
    image_soft_tokens=140,
    max_images=2,
    max_image_bytes=1000,
    max_image_pixels=2000,
    image_memory_bytes=3000,
    image_threads=1,
    fetch_images=True,
    fetch_timeout_s=1.5,
    load_timeout_s=1e6,
    progress_timeout_s=1.5,
    max_worker_deaths=7,
    worker_deaths_window_s=0,
    close_timeout_s=2,
)


def parsed(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig())


def as_passed_by_the_server(config: ModelConfig) -> dict:
    return json_format.MessageToDict(config, preserving_proto_field_name=True)


def test_the_committed_config_is_what_the_command_writes(tmp_path):
    output = tmp_path / "config.pbtxt"
    result = CliRunner().invoke(app, ["config", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert output.read_text() == COMMITTED.read_text()


@pytest.mark.parametrize("settings", [Settings(), OTHERS])
def test_settings_come_back_from_the_config(settings):
    config = parsed(config_pbtxt(settings, Instances()))
    assert Settings.from_model_config(as_passed_by_the_server(config)) == settings


def test_every_setting_reaches_the_worker_or_the_service(tmp_path):
    images = ImageLimits(max_images=2, max_bytes=1000, max_pixels=2000, remote=True, remote_timeout_s=1.5)
    assert OTHERS.image_limits() == images
    worker, limits = OTHERS.worker_config(tmp_path, {"A": "b"}), OTHERS.service_limits()
    assert worker.engine_dir == Path(OTHERS.engine_dir)
    expected = EngineLimits(max_sequences=3, max_cached_tokens=1000, prefix_cache=False, commit_last=True, max_pass_rows=64)
    assert EngineLimits(**worker.limits) == expected
    assert EngineLimits(**Settings().worker_config(tmp_path, {}).limits) == EngineLimits()
    assert EngineLimits(**Settings(memory_bytes=7).worker_config(tmp_path, {}).limits) == EngineLimits(memory_bytes=7)
    assert dict(worker.environment) == {"A": "b", "OMP_NUM_THREADS": "3"}
    assert Settings().worker_config(tmp_path, {"A": "b"}).environment == {"A": "b"}
    assert (limits.max_queued, limits.queue_timeout_s, limits.load_timeout_s) == (0, 1.25, 1e6)
    assert (limits.progress_timeout_s, limits.max_deaths, limits.deaths_window_s) == (1.5, 7, 0)
    assert Settings(engine_dir="../x").worker_config(tmp_path / "m", {}).engine_dir == tmp_path / "x"


def test_parameters_of_the_python_backend_are_not_ours():
    given = {"EXECUTION_ENV_PATH": {"string_value": "/env.tar.gz"}, "max_queued": {"string_value": "9"}}
    assert Settings.from_model_config({"parameters": given}) == Settings(max_queued=9)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"max_sequences": "-1"}, "parameter max_sequences: got '-1', expected a whole number of at least 0"),
        ({"max_sequences": "many"}, "parameter max_sequences: got 'many', expected a whole number of at least 0"),
        ({"max_queued": "1.5"}, "parameter max_queued: got '1.5', expected a whole number of at least 0"),
        ({"queue_timeout_s": "inf"}, "parameter queue_timeout_s: got 'inf', expected a number of seconds of at least 1"),
        ({"progress_timeout_s": "0"}, "parameter progress_timeout_s: got '0', expected a number of seconds of at least 1"),
        (
            {"fetch_timeout_s": "1e300"},  # a socket's timeout would be an internal error, at every image
            "parameter fetch_timeout_s: got '1e300', expected a number of seconds of at least 0 of at most 1000000000",
        ),
        ({"max_queued": "x" * 9999}, f"parameter max_queued: got '{'x' * 76}..., expected a whole number of at least 0"),
        ({"prefix_cache": "maybe"}, "parameter prefix_cache: got 'maybe', expected true or false"),
        (
            {"max_image_pixels": "89478486"},
            "parameter max_image_pixels: got '89478486', expected a whole number of at least 1 of at most 89478485",
        ),
        ({"image_soft_tokens": "100"}, "parameter image_soft_tokens: got '100', expected 0 or one of 70, 140, 280, 560, 1120"),
        ({"image_soft_tokens": "a"}, "parameter image_soft_tokens: got 'a', expected a whole number"),
        ({"engine_dir": ""}, "parameter engine_dir: got '', expected a path"),
        ({"nonsense": "1"}, "got the unknown parameter nonsense, expected some of engine_dir, max_sequences"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(parameters, words):
    with pytest.raises(ValueError) as caught:
        Settings.from_parameters(parameters)
    assert str(caught.value).startswith(f"config.pbtxt: {words}") and "\n" not in str(caught.value)
    (name,), (value,) = parameters, parameters.values()
    result = CliRunner().invoke(app, ["config", "--output", "/nowhere/config.pbtxt", "--set", f"{name}={value}"])
    assert result.exit_code == 1 and words in result.output


def test_settings_are_read_back_as_they_were_written():
    settings = Settings(load_timeout_s=1234567.0, progress_timeout_s=1.1, queue_timeout_s=30.0)
    assert settings.parameters()["queue_timeout_s"] == "30"
    assert Settings.from_parameters(settings.parameters()) == settings


@pytest.mark.parametrize(
    ("settings", "instances", "seconds"),
    [
        (Settings(), Instances(), 1800),
        (Settings(load_timeout_s=7200), Instances(count=2), 14400),
        (Settings(load_timeout_s=60), Instances(count=2, gpus=(0, 1, 3)), 360),
    ],
)
def test_a_server_waits_for_as_long_as_its_model_may_take_to_load(settings, instances, seconds):
    assert seconds_to_load(config_pbtxt(settings, instances)) == seconds


def test_a_wrong_time_is_told_by_the_model():
    text = config_pbtxt(Settings(), Instances()).replace('"1800"', '"never"')
    assert seconds_to_load(text) == 1800


def test_a_config_that_cannot_be_written(tmp_path):
    output = tmp_path / "no" / "config.pbtxt"
    result = CliRunner().invoke(app, ["config", "--output", str(output)])
    reason = "cannot be written (No such file or directory), expected a file in an existing directory"
    assert (result.exit_code, result.output) == (1, f"error: --output: {output} {reason}\n")


def test_an_engine_that_is_a_link_to_itself_is_left_to_its_reader(tmp_path):
    """Which says what is wrong with it, in one line; pathlib's resolve raises."""
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert str(loop) in changed_config(COMMITTED, {"engine_dir": str(loop)})
    assert Settings(engine_dir=str(loop)).worker_config(tmp_path, {}).engine_dir == loop
    TritonServer(engine_dir=loop, model_repository=loop)


@pytest.mark.parametrize("given", ["0,one", ",", "1,-2", "2147483648"])
def test_gpus_must_be_numbers(given):
    result = CliRunner().invoke(app, ["config", "--output", "/nowhere/config.pbtxt", "--gpus", given])
    assert result.exit_code == 1 and f"--gpus: got '{given}', expected numbers and commas like 0,1" in result.output


@pytest.mark.parametrize("command", [["config", "--output", "/nowhere/config.pbtxt"], ["serve", "--engine", "/nowhere"]])
def test_a_gpu_is_named_once(command, monkeypatch):
    monkeypatch.setattr("backend.__main__.leave_on_signals", lambda _: None)  # they are this process's
    result = CliRunner().invoke(app, [*command, "--gpus", "0,1,00"])
    expected = "expected each GPU once; remove one, or pass --instances for replicas"
    assert (result.exit_code, result.output) == (1, f"error: --gpus: got 0 twice, {expected}\n")


@pytest.mark.parametrize(
    ("instances", "kind"),
    [
        (Instances(), ModelInstanceGroup.KIND_CPU),
        (Instances(count=3), ModelInstanceGroup.KIND_CPU),
        (Instances(gpus=(0, 2)), ModelInstanceGroup.KIND_GPU),
    ],
)
def test_instances(instances, kind):
    for text in (config_pbtxt(Settings(), instances), changed_config(COMMITTED, {}, instances)):
        (group,) = parsed(text).instance_group
        assert (group.kind, group.count, tuple(group.gpus)) == (kind, instances.count, instances.gpus)


def test_what_is_not_changed_stays(tmp_path):
    path = tmp_path / "config.pbtxt"
    path.write_text(config_pbtxt(Settings(engine_dir="engine", max_queued=5), Instances(count=2)))
    changed = parsed(changed_config(path, {"max_sequences": "3"}))
    expected = Settings(engine_dir=str(tmp_path / "engine"), max_queued=5, max_sequences=3)
    assert Settings.from_model_config(as_passed_by_the_server(changed)) == expected
    assert changed.instance_group[0].count == 2
    assert changed.input == parsed(path.read_text()).input


@pytest.mark.parametrize(
    ("text", "parameters", "words"),
    [("backend: 5", {}, ["config.pbtxt", "python -m backend config"]), ("", {"nonsense": "1"}, ["config.pbtxt", "nonsense"])],
)
def test_a_config_that_cannot_be_changed_says_why(tmp_path, text, parameters, words):
    path = tmp_path / "config.pbtxt"
    path.write_text(text)
    with pytest.raises(ModelConfigError) as caught:
        changed_config(path, parameters)
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_the_tensors_of_the_config_are_those_of_the_table():
    config = parsed(COMMITTED.read_text())
    for given, table in ((config.input, INPUTS), (config.output, OUTPUTS)):
        found = [(tensor.name, DataType.Name(tensor.data_type), tuple(tensor.dims)) for tensor in given]
        assert found == [(spec.name, f"TYPE_{spec.datatype}", spec.dims) for spec in table]
    assert all(tensor.optional for tensor in config.input)
    assert {spec.name for spec in INPUTS} == set(READERS)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--set", "max_queued=1", "--set", "max_queued=9"], "--set max_queued: got '1' and '9', expected one value"),
        (["--set", "engine_dir=/b", "--engine", "/a"], "--set engine_dir: got /b beside --engine /a; remove one"),
        (["--host", "nowhere.invalid", "--engine", "/a"], "--host: got 'nowhere.invalid', which has no IPv4 address ("),
    ],
)
def test_what_a_server_is_told_must_be_one_thing(arguments, line, monkeypatch):
    monkeypatch.setattr("backend.__main__.leave_on_signals", lambda _: None)  # they are this process's
    monkeypatch.setattr("backend.triton_server.launch.stage_model", lambda *_: None)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 1 and result.output.startswith(f"error: {line}")
