"""Proof ladder, rung 7, on a machine with two GPUs: experts that both share."""

from pathlib import Path

import pytest
import torch
from expert_formats import FORMATS, arranged, is_fp8
from feed_forward_operands import EPS, TOP_K, operands
from small_checkpoints import TINY

from backend import LLM, SamplingConfig
from backend.graphs import Graphs
from builder.build import build_engine
from plugins import feed_forward_op, spread_op

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(autouse=True)
def _connected():
    """As `backend.expert_gpus` does it."""
    one, other = (torch.zeros(1, device=f"cuda:{gpu}") for gpu in range(2))
    one.copy_(other)
    other.copy_(one)


@pytest.mark.parametrize("wanted", FORMATS)
@pytest.mark.parametrize("rows", [1, 256, 1024, 4096, 16384])
def test_the_operator_gives_every_bit_of_that_of_one_gpu(rows, wanted):
    """Also replayed from a graph, with the inputs of the moment."""
    torch.manual_seed(0)
    fp8_rows = wanted == "narrow"
    *given, experts = operands(rows, 256, 64, 128, fp8=is_fp8(wanted))
    experts = arranged(experts, wanted)
    own, far = ([each.chunk(2)[gpu].contiguous().to(f"cuda:{gpu}") for each in experts] for gpu in range(2))
    on_gpu = [[each.cuda() for each in part] if isinstance(part, list) else part.cuda() for part in given]
    expected = feed_forward_op.feed_forward(*on_gpu, [each.cuda() for each in experts], TOP_K, EPS, fp8_rows)

    def run(*rows: torch.Tensor):
        return spread_op.feed_forward_spread(*rows, *on_gpu[2:], [*own, *far], 2, TOP_K, EPS, fp8_rows)

    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(run(*on_gpu[:2]), expected, strict=True))

    held = [torch.zeros_like(each) for each in on_gpu[:2]]
    results: list[tuple[torch.Tensor, ...]] = []
    replays = Graphs(num_gpus=2).captured(*[lambda: results.append(run(*held))] * 2)
    torch.cuda.empty_cache()
    for each, value in zip(held, on_gpu[:2], strict=True):
        each.copy_(value)
    for replay, replayed in zip(replays, results[2:], strict=True):  # after two that were not captured
        replay()
        assert all(torch.equal(*pair) for pair in zip(replayed, expected, strict=True))


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "plain"), ("bfloat16", "packed")])
def test_an_engine_gives_the_answers_of_one_gpu(dtype, stored, tmp_path: Path, render, held_out):
    """Compiled and captured, several sequences at once. In float32 new tokens go with a step; in bfloat16 the engines are
    batch-invariant, because what else is compiled into an encode pass rounds otherwise."""
    prompts = [render(question) for question in held_out]
    configs = [SamplingConfig(seed=seed, max_tokens=96) for seed in range(len(prompts))]
    choices = {"target": "inductor", "dtype": dtype, "device": "cuda", "expert_weights": stored, "report": print}
    results = []
    for num_gpus in (1, 2):
        engine = tmp_path / f"{num_gpus}"
        build_engine(TINY, engine, expert_gpus=num_gpus, batch_invariant=dtype == "bfloat16", **choices)
        results.append(LLM(engine, max_sequences=5).generate(prompts, configs))
    one, two = results
    assert [each.token_ids for each in two] == [each.token_ids for each in one]
    assert [each.num_steps for each in two] == [each.num_steps for each in one]
