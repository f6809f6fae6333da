"""Proof ladder, rung 7, on the tiny checkpoint: an engine built for the GPU, and its captured steps."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from nvfp4_weights import nvfp4_checkpoint
from small_checkpoints import TINY, network_session, random_image
from tokenizers import Tokenizer
from tolerances import assert_close

from backend import LLM, SamplingConfig
from backend.canvas_loop import CanvasLoop, CanvasState
from backend.encode_pass import NewTokens
from backend.engine import Engine, EngineLimits
from backend.generation_defaults import GenerationDefaults
from backend.kv_cache import PagedKVCache
from backend.opening import Opening
from backend.session import Session
from builder.build import build_engine
from builder.quantize import quantize_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SAMPLING = {"max_tokens": 96}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """dtype, and how the experts' weights are stored → the tiny checkpoint's engine, built for the GPU that is here when it is
    first asked for."""

    @cache
    def built(dtype: str, expert_weights: str = "auto") -> Path:
        place, checkpoint = tmp_path_factory.mktemp("engines"), TINY
        if expert_weights in ("nvfp4", "fp8"):  # which a checkpoint has or has not
            published = nvfp4_checkpoint(TINY, place / "published") if expert_weights == "nvfp4" else TINY
            checkpoint, expert_weights = place / "checkpoint", "auto"
            quantize_checkpoint(published, checkpoint)
        choices = {"target": "inductor", "dtype": dtype, "device": "cuda", "expert_weights": expert_weights}
        build_engine(checkpoint, place / dtype, report=print, **choices)
        return place / dtype

    return built


def uncompiled(dtype: str, **limits) -> LLM:
    """The network's own modules on the GPU, under the plain loop."""
    session = network_session(TINY, dtype=dtype, device="cuda")
    defaults = GenerationDefaults.from_json(TINY / "generation_config.json")
    engine = Engine(session, Tokenizer.from_file(str(TINY / "tokenizer.json")), defaults, EngineLimits(**limits))
    cache = engine.scheduler._cache
    engine.scheduler._loop = CanvasLoop(session, cache)
    return LLM.from_engine(engine)


@pytest.mark.parametrize("max_sequences", [1, 5])
def test_float32_tokens_are_those_of_the_uncompiled_network(engine, max_sequences, render, held_out):
    prompts = [render(question) for question in held_out]
    configs = [SamplingConfig(seed=seed, **SAMPLING) for seed in range(len(prompts))]
    expected = uncompiled("float32", max_sequences=max_sequences).generate(prompts, configs)
    actual = LLM(engine("float32"), max_sequences=max_sequences).generate(prompts, configs)
    assert [result.token_ids for result in actual] == [result.token_ids for result in expected]
    assert [result.num_steps for result in actual] == [result.num_steps for result in expected]


def test_float32_tokens_of_requests_with_extras_are_those_of_the_uncompiled_network(engine, render, held_out):
    """Some requests have none, and are in the same steps."""
    prompts = [render(question) for question in held_out]
    extras = (
        {"logprobs": True, "top_logprobs": 2},
        {"logit_bias": {5: 1.0}, "repetition_penalty": 1.1},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "frequency_penalty": 0.3, "presence_penalty": 0.1},
        {"infill": [1, [297, 277], 40, [298] * 3], "ignore_eos": True},
        {"min_tokens": 40},
        {"structured_outputs": {"regex": "It is [0-9 ]{2,40}[a-d]"}, "top_k": 9, "logprobs": True},
        {},
    )
    configs = [SamplingConfig(seed=seed, **SAMPLING, **extras[seed % 7]) for seed in range(len(prompts))]
    expected = uncompiled("float32", max_sequences=5).generate(prompts, configs)
    actual = LLM(engine("float32"), max_sequences=5).generate(prompts, configs)
    assert [result.token_ids for result in actual] == [result.token_ids for result in expected]
    assert [result.num_steps for result in actual] == [result.num_steps for result in expected]
    for own, other in zip(actual, expected, strict=True):
        assert (own.logprobs is None) == (other.logprobs is None)
        assert (own.logprobs or []) == pytest.approx(other.logprobs or [], abs=1e-4)
        tops = [[token for token, _ in place] for result in (own, other) for place in result.top_logprobs or ()]
        assert tops[: len(tops) // 2] == tops[len(tops) // 2 :]


def test_numbers_that_are_not_finite_are_told(engine):
    llm = LLM(engine("float32"), max_sequences=2)
    loop = llm._engine.scheduler._loop
    slots = [loop._cache.open(64) for _ in range(2)]
    for slot in slots:
        loop.start_canvas(slot, 0, SamplingConfig(seed=slot, max_denoising_steps=2).resolve(llm._engine.defaults))
    assert loop.step(slots) == [CanvasState.DENOISING] * 2
    loop._soft_embeds[slots[1]] = torch.nan
    assert loop.step(slots) == [CanvasState.FINISHED, CanvasState.NOT_FINITE]


def test_float32_image_features_are_those_of_the_network_on_the_cpu(engine):
    session, network = Session.load(engine("float32")), network_session(TINY, dtype="float32")
    for num_soft_tokens in (1, 70, 257):
        image = random_image(num_soft_tokens, session.manifest.model.vision)
        assert_close(session.vision(image).cpu(), network.vision(image), torch.float32)


@pytest.mark.parametrize("expert_weights", ["packed", "int4", "nvfp4"])
def test_bfloat16_answers_are_right(engine, render, held_out, expert_weights):
    prompts = [render(question) for question in held_out]
    results = LLM(engine("bfloat16", expert_weights)).generate(
        prompts, SamplingConfig(seed=1, skip_special_tokens=False, **SAMPLING)
    )
    wrong = [
        (question.messages[-1]["content"], question.answer, result.text)
        for question, result in zip(held_out, results, strict=True)
        if result.text != question.answer
    ]
    print(f"{len(held_out) - len(wrong)} of {len(held_out)} held-out questions answered exactly, {expert_weights} experts")
    assert len(wrong) <= len(held_out) // 20, wrong


@pytest.mark.parametrize(
    "stored", [("float32",), *(("bfloat16", stored) for stored in ("packed", "int4", "nvfp4", "fp8"))], ids=" ".join
)
def test_replayed_steps_are_the_uncaptured_ones_bit_for_bit(engine, stored):
    """Three rows in a bucket of four, twice with new tokens, of another row and of one of them, then one alone; every state
    tensor and all pages after each step."""
    from backend.captured_loop import CapturedLoop

    session = Session.load(engine(*stored))
    model = session.manifest.model
    defaults = GenerationDefaults.from_json(TINY / "generation_config.json")
    states = []
    for capture in (True, False):
        cache = PagedKVCache(
            model,
            page_size=session.manifest.build.page_size,
            num_pages=dict.fromkeys(model.attention, 8),
            max_sequences=4,
            max_tokens=model.max_position_embeddings,
            dtype=session.dtype,
            device=session.device,
        )
        session.bind_pages(cache.pages)
        loop = CapturedLoop(session, cache, capture=capture)
        generator, states_of_loop = torch.Generator(session.device).manual_seed(0), []
        *slots, other = [cache.open(length) for length in (40, 40, 17, 40)]
        for slot, length in zip(slots, (40, 3, 17), strict=True):
            shapes = [(length, 2, *pages.shape[3:]) for pages in cache.pages]
            new_kv = [torch.randn(shape, generator=generator, device=session.device).to(session.dtype) for shape in shapes]
            cache.append([slot], [length], new_kv)
            infill = [4, [5, 6]] if slot == slots[1] else []
            opening = Opening(np.arange(model.vocab_size) % 7 == 0, 9) if slot == slots[2] else None
            config = SamplingConfig(seed=slot, confidence_threshold=0, infill=infill)
            loop.start_canvas(slot, 0, config.resolve(defaults), opening)
        new_tokens = [
            NewTokens(slot=slot, token_ids=list(range(20, 20 + n)), page_keys=[]) for slot, n in ((other, 32), (1, 7))
        ]
        for rows, new in ((slots, None), (slots, new_tokens[0]), (slots, new_tokens[1]), (slots[1:2], None), (slots, None)):
            finished = loop.step(rows, new)
            canvases = [loop.argmax_canvas(slot) for slot in rows]
            state = [loop._canvas, loop._soft_embeds, loop._argmax, loop._stable_steps, loop._step]
            kept = [*(tensor[:-1].clone() for tensor in state), *(pages.clone() for pages in cache.pages)]
            states_of_loop.append((finished, canvases, kept))
        states.append(states_of_loop)
    for (finished, canvases, captured), (expected_finished, expected_canvases, expected) in zip(*states, strict=True):
        assert (finished, canvases) == (expected_finished, expected_canvases)
        assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))
