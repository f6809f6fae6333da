"""The real Triton server when its engine worker dies, and when the engine that it is told to load cannot be used."""

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import tritonclient.grpc as grpcclient
from damaged_engines import damaged_engine
from server_clients import ANY_PORTS, ENDLESS, NO_PROXY, QUESTION, Refused, Stream, ask, ask_once, metrics
from server_processes import engine_workers, stubs
from tritonclient.utils import InferenceServerException
from waiting import wait_until

from backend.triton_server.launch import MODEL_NAME, TritonServer
from backend.triton_server.model_config import Instances

LONG = {"sampling_parameters": json.dumps({"ignore_eos": True, "confidence_threshold": 0, "max_tokens": 640})}
SHORT = {"text_input": QUESTION, "max_tokens": 1}


@pytest.fixture(scope="module", autouse=True)
def place_of_kept_logs(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("servers")))
        yield


@pytest.fixture(scope="module")
def server(engine_dir) -> Iterator[TritonServer]:
    parameters = {"max_worker_deaths": "3", "progress_timeout_s": "10"}
    with TritonServer(engine_dir=engine_dir, parameters=parameters, exit_timeout_s=1, **ANY_PORTS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> Iterator[grpcclient.InferenceServerClient]:
    with grpcclient.InferenceServerClient(server.grpc_url, channel_args=NO_PROXY) as client:
        yield client


def kill_worker(server: TritonServer, instance: int = 0) -> None:
    """Waits for the worker that replaces the last one killed."""
    wait_until(lambda: len(engine_workers(server)) > instance)
    os.kill(engine_workers(server)[instance], signal.SIGKILL)


def start_streams(server: TritonServer, count: int) -> list[Stream]:
    streams = [Stream(server.grpc_url, text_input=QUESTION, stream=True, **ENDLESS) for _ in range(count)]
    for stream in streams:
        next(iter(stream))
    return streams


def errors(streams: list[Stream]) -> list[str]:
    found = []
    for stream in streams:
        with pytest.raises(Refused) as caught:
            list(stream)
        stream.close()
        found.append(str(caught.value))
    return found


def test_three_deaths_unload_the_model_and_a_load_brings_it_back(server, client):
    """A kill in mid-stream, a worker that hangs, a kill without requests."""
    streams = start_streams(server, 3)
    kill_worker(server)
    assert all("ended by SIGKILL" in error and "\n" not in error for error in errors(streams))
    assert ask_once(server.grpc_url, **SHORT).num_output_tokens == 1
    assert_metric(server, "diffusiongemma_worker_restarts_total", 1)
    assert_metric(server, "diffusiongemma_active_requests", 0)

    streams = start_streams(server, 1)
    os.kill(engine_workers(server)[0], signal.SIGSTOP)
    (error,) = errors(streams)
    assert "made no progress within 10 s" in error
    assert ask_once(server.grpc_url, **SHORT).num_output_tokens == 1
    assert client.is_model_ready(MODEL_NAME)

    kill_worker(server)
    wait_until(lambda: not client.is_model_ready(MODEL_NAME))
    with pytest.raises(Refused):
        ask(server.grpc_url, **SHORT)
    wait_until(lambda: not (engine_workers(server) or stubs(server)))
    assert not client.is_model_ready(MODEL_NAME)

    client.load_model(MODEL_NAME)
    assert client.is_model_ready(MODEL_NAME)
    assert ask_once(server.grpc_url, **SHORT).num_output_tokens == 1


def assert_metric(server: TritonServer, name: str, value: float) -> None:
    """Waits until the metric, which is exported now and then, has the value."""
    wait_until(lambda: metrics(server.metrics_url, name) == value)


@pytest.mark.parametrize(("file", "keep"), [("denoise.pt2", 0.5), ("manifest.json", 0.5), ("generation_config.json", 0.9)])
def test_who_loads_an_engine_that_cannot_be_used_reads_why(server, client, engine_dir, tmp_path, file, keep):
    """The model that was there stays."""
    config = client.get_model_config(MODEL_NAME, as_json=True)["config"]
    damaged = damaged_engine(engine_dir, tmp_path / "engine", file, keep=keep)
    config["parameters"]["engine_dir"]["string_value"] = str(damaged)
    with pytest.raises(InferenceServerException) as caught:
        client.load_model(MODEL_NAME, config=json.dumps(config))
    reason, _, places = caught.value.message().partition("\n")
    assert f"{damaged}/{file}" in reason
    assert len(places.split()) == 4, places  # "At:", our own file, the function, ";": the Python backend adds that much
    assert ask_once(server.grpc_url, **SHORT).num_output_tokens == 1


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"tools": {"cpu": "z80 NO AVX"}}, "built for a CPU z80 NO AVX, but this one is"),
        (
            {"build": {"device": "cuda"}, "gpu": {"name": "NVIDIA H100", "compute_capability": [9, 0]}},
            "built for NVIDIA H100 (compute capability 9.0), but",
        ),
    ],
    ids=["CPU", "GPU"],
)
def test_who_loads_an_engine_for_another_machine_reads_why(server, client, engine_dir, tmp_path, record, words):
    config = client.get_model_config(MODEL_NAME, as_json=True)["config"]
    engine = damaged_engine(engine_dir, tmp_path / "engine", "config.json", keep=1)
    manifest = json.loads((engine / "manifest.json").read_text())
    for part, values in record.items():
        manifest[part] = {**(manifest[part] or {}), **values}
    (engine / "manifest.json").write_text(json.dumps(manifest))
    config["parameters"]["engine_dir"]["string_value"] = str(engine)
    with pytest.raises(InferenceServerException) as caught:
        client.load_model(MODEL_NAME, config=json.dumps(config))
    assert words in caught.value.message().partition("\n")[0]
    assert ask_once(server.grpc_url, **SHORT).num_output_tokens == 1


def test_a_reload_under_load_loses_nothing(server, client):
    """The old instance ends the requests that it has, the new one takes the next; an unload waits for what is under way."""
    config = client.get_model_config(MODEL_NAME, as_json=True)["config"]
    before = set(engine_workers(server))
    running = Stream(server.grpc_url, text_input=QUESTION, stream=True, **LONG)
    next(iter(running))
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(ask_once, server.grpc_url, **SHORT) for _ in range(100)]
        config["parameters"]["max_queued"]["string_value"] = "99"
        client.load_model(MODEL_NAME, config=json.dumps(config))
        assert {each.result().num_output_tokens for each in asked} == {1}
    assert list(running)[-1].finish_reason == "length"
    running.close()
    wait_until(lambda: len(engine_workers(server)) == 1)
    assert before.isdisjoint(engine_workers(server))
    wait_until(lambda: len(stubs(server)) == 1)  # the old instance has cleared the gauges, which are the new one's too
    wait_until(lambda: metrics(server.metrics_url, "diffusiongemma_kv_pages") > 0)

    running = Stream(server.grpc_url, text_input=QUESTION, stream=True, **LONG)
    next(iter(running))
    client.unload_model(MODEL_NAME)
    assert list(running)[-1].finish_reason == "length"
    running.close()
    wait_until(lambda: not engine_workers(server) and not stubs(server))
    client.load_model(MODEL_NAME)


def test_a_worker_ends_with_its_stub(engine_dir):
    with TritonServer(engine_dir=engine_dir, exit_timeout_s=0, **ANY_PORTS) as server:
        (stub,) = stubs(server)
        os.kill(stub, signal.SIGKILL)
        wait_until(lambda: not engine_workers(server))


def test_two_instances_share_the_requests_and_one_outlives_the_others_worker(engine_dir):
    with TritonServer(engine_dir=engine_dir, instances=Instances(count=2), exit_timeout_s=1, **ANY_PORTS) as server:
        killed, other = engine_workers(server)
        streams = start_streams(server, 8)
        os.kill(killed, signal.SIGKILL)
        go_on = [stream.goes_on(responses=4) for stream in streams]
        for stream in streams:
            stream.close(cancel=True)
        assert {True, False} == set(go_on)  # each instance had some of them
        assert other in engine_workers(server)
        series = 'diffusiongemma_requests_total{{instance="diffusiongemma_0_{}",model="diffusiongemma",outcome="failed"}}'
        wait_until(lambda: metrics(server.metrics_url, "diffusiongemma_worker_restarts_total") == 1)
        failed = [metrics(server.metrics_url, series.format(index)) for index in (0, 1)]
        assert sorted(failed) == [0, go_on.count(False)]
        assert ask_once(server.grpc_url, **SHORT).num_output_tokens == 1
