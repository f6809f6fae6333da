"""Proof ladder, rung 7, through Triton Inference Server: the tiny checkpoint's engine on a GPU, over gRPC and OpenAI's API."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from server_clients import ANY_PORTS, ENDLESS, Stream, ask, ask_once
from server_processes import engine_workers
from small_checkpoints import TINY
from tiny_tasks import Question
from waiting import wait_until

from backend.openai_server.launch import FrontEnd
from backend.openai_server.settings import OpenAISettings
from backend.triton_server.launch import TritonServer
from backend.triton_server.model_config import Instances
from builder.build import build_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SAMPLING = {"max_tokens": 160, "sampling_parameters": '{"skip_special_tokens": false}'}
MAX_WRONG = 1 / 20


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("engines") / "tiny"
    build_engine(TINY, directory, target="inductor", dtype="bfloat16", device="cuda", report=print)
    return directory


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Path:
    """Where Triton's compiler keeps what the workers have it compile."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def server(engine, kernels) -> Iterator[TritonServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(kernels))
        with TritonServer(engine_dir=engine, parameters={"max_sequences": "8"}, report=print, **ANY_PORTS) as started:
            yield started


def wrong_answers(server: TritonServer, prompts: list[str], questions: list[Question]) -> list[tuple[str, str]]:
    """All are asked at once."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        responses = pool.map(lambda prompt: ask_once(server.grpc_url, text_input=prompt, seed=1, **SAMPLING), prompts)
        texts = [response.text for response in responses]
    pairs = zip(questions, texts, strict=True)
    return [(question.answer, text) for question, text in pairs if text != question.answer]


def test_no_request_waits_for_a_kernel_to_be_compiled(server, kernels):
    """First: prompts of one, of some and of most tokens that a pass takes, and several at once."""
    compiled = sorted(kernels.iterdir())
    assert compiled
    for length in (1, 40, 700, 2000):
        ask(server.grpc_url, input_ids=[5] * length, max_tokens=40)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda length: ask(server.grpc_url, input_ids=[5] * length, max_tokens=40), range(1, 400, 50)))
    new = {path.name for folder in set(kernels.iterdir()) - set(compiled) for path in folder.iterdir()}
    assert not new


def test_answers_are_right(server, render, held_out):
    wrong = wrong_answers(server, [render(question) for question in held_out], held_out)
    print(f"{len(held_out) - len(wrong)} of {len(held_out)} held-out questions answered exactly")
    assert len(wrong) <= MAX_WRONG * len(held_out), wrong


def test_openais_client_gets_answers_whole_and_in_pieces(server, tmp_path):
    chat = {"model": "diffusiongemma", "max_tokens": 160, "seed": 1}
    chat["messages"] = [{"role": "user", "content": "What is 17 + 25?"}]
    settings = OpenAISettings(triton_urls=(server.grpc_url,), triton_metrics_url=server.metrics_url, port=0)
    with FrontEnd(settings, tmp_path / "openai.log") as front_end:
        client = OpenAI(base_url=f"{front_end.url}/v1", api_key="none", max_retries=0)
        whole = client.chat.completions.create(**chat).choices[0].message.content
        pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **chat)]
    assert whole == "".join(pieces) == "42"


def test_after_a_killed_worker_the_next_one_answers(server, render, held_out):
    under_way = Stream(server.grpc_url, input_ids=[5] * 20, stream=True, **ENDLESS)
    next(iter(under_way))
    (worker,) = engine_workers(server)
    os.kill(worker, signal.SIGKILL)
    assert not under_way.goes_on(responses=200)
    under_way.close()
    assert not wrong_answers(server, [render(held_out[0])], held_out[:1])
    assert engine_workers(server) != [worker]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_replica_on_each_gpu(engine, render, held_out):
    """Each holds memory of its own GPU, takes part, and gives all of it back."""
    devices = (0, 1)
    free_before = [torch.cuda.mem_get_info(device)[0] for device in devices]
    instances = Instances(gpus=devices)
    with TritonServer(engine_dir=engine, instances=instances, report=print, **ANY_PORTS) as server:
        taken = [before - torch.cuda.mem_get_info(device)[0] for before, device in zip(free_before, devices, strict=True)]
        assert min(taken) > 100 << 20
        wrong = wrong_answers(server, [render(question) for question in held_out], held_out)
        assert len(wrong) <= MAX_WRONG * len(held_out), wrong
    wait_until(lambda: all(torch.cuda.mem_get_info(device)[0] > free_before[device] - (8 << 20) for device in devices))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_server_of_one_gpu_takes_nothing_of_the_other(engine, render, held_out):
    free_before = [torch.cuda.mem_get_info(device)[0] for device in (0, 1)]
    with TritonServer(engine_dir=engine, instances=Instances(gpus=(0,)), gpus=(1,), report=print, **ANY_PORTS) as server:
        assert not wrong_answers(server, [render(held_out[0])], held_out[:1])
        taken = [before - torch.cuda.mem_get_info(device)[0] for device, before in enumerate(free_before)]
        assert taken[0] < 8 << 20 and taken[1] > 100 << 20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_an_engine_whose_experts_two_gpus_share(tmp_path, render, held_out):
    build_engine(TINY, tmp_path / "engine", target="inductor", dtype="bfloat16", device="cuda", expert_gpus=2, report=print)
    free_before = torch.cuda.mem_get_info(1)[0]
    with TritonServer(engine_dir=tmp_path / "engine", parameters={"max_sequences": "8"}, report=print, **ANY_PORTS) as server:
        assert free_before - torch.cuda.mem_get_info(1)[0] > 100 << 20
        wrong = wrong_answers(server, [render(question) for question in held_out], held_out)
        assert len(wrong) <= MAX_WRONG * len(held_out), wrong
    wait_until(lambda: torch.cuda.mem_get_info(1)[0] > free_before - (8 << 20))
