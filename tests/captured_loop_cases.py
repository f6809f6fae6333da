"""The cases of `test_captured_loop.py`, which runs this file in Triton's interpreter (TRITON_INTERPRET=1)."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_checkpoints import network_session, random_checkpoint
from test_scheduler import DEFAULTS, add, prompt_of
from test_scheduler import run as run_all
from tokenizers import Tokenizer
from triton_interpreter import let_casts_round_to_bfloat16, save_the_interpreters_time

from backend import engine, sampler
from backend.canvas_loop import CanvasLoop, CanvasState
from backend.captured_loop import CapturedLoop
from backend.engine import Engine, EngineLimits
from backend.generation_defaults import GenerationDefaults
from backend.kv_cache import PagedKVCache
from backend.opening import Opening
from backend.pass_memory import state_bytes
from backend.prefix_cache import extend_page_keys
from backend.sampling_config import SamplingConfig
from plugins.vocabulary.feedback import soft_embeddings

VOCAB_SIZES = (97, 448, 5000)

let_casts_round_to_bfloat16()
save_the_interpreters_time()

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("cap", [30.0, None])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_soft_embeddings(vocab_size, cap):
    """float32 to roundings; bfloat16 against the definition in float32 of the same rounded logits: a few of its roundings."""
    torch.manual_seed(vocab_size)
    temperature = torch.tensor([0.4, 0.8, 1.0, 2.0])
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
        raw = (torch.randn(4, vocab_size) * 8).to(dtype)
        embedding = torch.randn(vocab_size, 24).to(dtype)
        processed = sampler.soft_cap(raw, cap) / temperature[:, None]
        expected = sampler.soft_embeddings(processed, embedding, 24**0.5, dtype)
        actual = soft_embeddings(
            raw, cap=cap, temperature=temperature, argmax=processed.argmax(-1), embedding=embedding, embed_scale=24**0.5
        )
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_soft_embeddings_of_given_tokens_are_their_embeddings(dtype):
    """To the bit, also of a token that the logits rule out; other rows are as without them."""
    torch.manual_seed(0)
    raw, embedding = (torch.randn(3, 3000) * 8).to(dtype), torch.randn(3000, 24).to(dtype)
    given = torch.tensor([raw[0].argmin(), sampler.BLANK, 2999])
    rest = {"cap": None, "temperature": torch.ones(3), "argmax": raw.argmax(-1), "embedding": embedding, "embed_scale": 24**0.5}
    without = soft_embeddings(raw.clone(), **rest)
    expected = sampler.put_given_embeddings(given, without, embedding, 24**0.5)
    assert torch.equal(soft_embeddings(raw, given=given, **rest), expected)
    assert torch.equal(expected[1], without[1]) and not torch.equal(expected[0], without[0])


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return network_session(random_checkpoint(tmp_path_factory.mktemp("random"), seed=8), page_size=8)


def loop_of(kind, session, prefixes, **options):
    """A loop over sequences with random prefixes in the cache."""
    model = session.manifest.model
    cache = PagedKVCache(
        model,
        page_size=8,
        num_pages=dict.fromkeys(model.attention, 64),
        max_sequences=len(prefixes) + 1,
        max_tokens=256,
        dtype=session.dtype,
        device=session.device,
    )
    session.bind_pages(cache.pages)
    generator = torch.Generator().manual_seed(0)
    slots = [cache.open(length + 16) for length in prefixes]
    for slot, length in zip(slots, prefixes, strict=True):
        shapes = [(length, 2, *pages.shape[3:]) for pages in cache.pages]
        cache.append([slot], [length], [torch.randn(shape, generator=generator) for shape in shapes])
    return kind(session, cache, **options), slots


SAMPLINGS = (
    {"seed": 1, "max_denoising_steps": 6},
    {"seed": 2, "temperature": 0, "max_denoising_steps": 3},
    {"seed": (1 << 64) - 3, "entropy_bound": 2.0, "stability_threshold": 0, "confidence_threshold": 9.0},
)


def run(session, loop, slots, extras=({}, {}, {})) -> list[tuple]:
    """Steps of three rows that join one after the other and leave when they are finished; what the loop says of each.

    extras: what each asks for beyond `SAMPLINGS`; "first": the tokens that the first ones of its canvas, as
    many as "places", may be; "repeated": tokens that a penalty is for.
    """
    defaults = GenerationDefaults.from_json({"eos_token_id": []})
    active, seen = [], []
    for tick in range(9):
        if tick < len(slots):
            extra = dict(extras[tick])
            first, places, repeated = extra.pop("first", None), extra.pop("places", 1), extra.pop("repeated", ())
            opening = Opening(np.isin(np.arange(97), first), places) if first else None
            sampling = replace(SamplingConfig(**SAMPLINGS[tick], **extra).resolve(defaults), repeated=repeated)
            loop.start_canvas(slots[tick], tick, sampling, opening)
            assert loop.num_steps(slots[tick]) == 0
            active.append(slots[tick])
        if not active:
            break
        finished = loop.step(active)
        for slot, is_finished in zip(list(active), finished, strict=True):
            seen.append((tick, slot, is_finished, loop.num_steps(slot), loop.argmax_canvas(slot)))
            if is_finished:
                active.remove(slot)
    return seen


@pytest.mark.parametrize("chunk_rows", [512 << 20, 97 * 4 * 24], ids=["one chunk", "chunks of 24 rows"])
def test_steps_are_those_of_the_plain_loop(session, chunk_rows):
    """Argmax canvases, steps and ends of rows with unequal prefixes, samplings and beginnings, in buckets of 1, 2 and 4."""
    prefixes = [30, 5, 41]
    plain = run(session, *loop_of(CanvasLoop, session, prefixes))
    captured = run(session, *loop_of(CapturedLoop, session, prefixes, workspace_bytes=chunk_rows))
    assert captured == plain
    assert {slot for _, slot, is_finished, *_ in plain if is_finished} == {slot for _, slot, *_ in plain}


@pytest.mark.parametrize("kind", [CanvasLoop, CapturedLoop])
def test_a_canvas_of_numbers_that_are_not_finite_is_told(kind, session):
    loop, slots = loop_of(kind, session, [30, 5, 41])
    for slot in slots:
        loop.start_canvas(slot, 0, SamplingConfig(seed=slot, max_denoising_steps=2).resolve(DEFAULTS))
    assert loop.step(slots) == [CanvasState.DENOISING] * 3
    loop._soft_embeds[slots[1]] = torch.nan
    assert loop.step(slots) == [CanvasState.FINISHED, CanvasState.NOT_FINITE, CanvasState.FINISHED]


def test_what_is_prepared_before_the_first_step_is_used_by_it(session, monkeypatch):
    """The buckets of at most three rows, the largest first; nothing of the preparation is left behind."""
    prefixes = [30, 5, 41]
    plain = run(session, *loop_of(CanvasLoop, session, prefixes))
    loop, slots = loop_of(CapturedLoop, session, prefixes, max_step_sequences=3)
    sizes, prepare = [], loop._prepare
    monkeypatch.setattr(loop, "_prepare", lambda size, mixed: sizes.append(size) or prepare(size, mixed))
    loop.rehearse()
    loop.prepare()
    assert sizes == [3, 2, 1]
    assert run(session, loop, slots) == plain
    assert sizes == [3, 2, 1]


@pytest.mark.parametrize(
    ("extras", "workspace_bytes"),
    [
        (
            ({"logprobs": True, "top_logprobs": 2}, {"logit_bias": {5: 3.0}}, {"top_k": 7, "top_p": 0.8, "min_p": 0.01}),
            97 * 4 * 24,
        ),
        (({}, {"logit_bias": {5: 3.0, 9: -100.0}, "logprobs": True}, {"top_k": 7}), 512 << 20),
        (
            (
                {"repetition_penalty": 3.0, "repeated": (*range(2, 97, 3),), "logprobs": True},
                {"repetition_penalty": 0.5, "repeated": (*range(90),), "logit_bias": {5: 3.0}},
                {"repetition_penalty": 1.5, "repeated": (7, 50, 96), "first": [7, 50, 96], "top_k": 7},
            ),
            97 * 4 * 24,
        ),
        (({"infill": [3, [5, 6], 4, [7]]}, {}, {"infill": [40, [8] * 5], "top_k": 7, "logprobs": True}), 97 * 4 * 24),
        (
            (
                {"first": [7, 50, 96], "logprobs": True, "top_logprobs": 2},
                {"first": [60], "places": 3},
                {
                    "first": [3, 4, 5, 6],
                    "logit_bias": {3: -2.0, 9: 4.0},
                    "top_k": 2,
                    "top_p": 0.9,
                    "logprobs": True,
                    "places": 99,
                },
            ),
            97 * 4 * 24,
        ),
    ],
    ids=[
        "all rows, chunks of 24",
        "two of three, one chunk",
        "penalties, also with a bias and a choice of first tokens",
        "given tokens, of the third in its third canvas",
        "a choice of first tokens, also with a bias and filters",
    ],
)
def test_rows_with_extras_are_those_of_the_plain_loop(session, extras, workspace_bytes, monkeypatch):
    """In the steps that all others are in. Log probabilities to roundings that the steps of a canvas hand on."""
    prefixes = [30, 5, 41]
    plain_loop, slots = loop_of(CanvasLoop, session, prefixes)
    plain = run(session, plain_loop, slots, extras)
    loop, slots = loop_of(CapturedLoop, session, prefixes, workspace_bytes=workspace_bytes)
    steps, prepare = [], loop._prepare
    monkeypatch.setattr(loop, "_prepare", lambda *key: steps.append(key) or prepare(*key))
    assert run(session, loop, slots, extras) == plain
    assert sorted(steps) == [(1, False), (2, False), (4, False)]
    for slot, extra in zip(slots, extras, strict=True):
        expected, own = plain_loop.logprobs(slot), loop.logprobs(slot)
        assert (own is not None) == (expected is not None) == extra.get("logprobs", False)
        for each, other in zip(own or (), expected or (), strict=True):
            assert each.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in each.top] == [token for token, _ in other.top]
            assert [value for _, value in each.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


def test_a_slot_keeps_nothing_of_the_request_before(session):
    loop, slots = loop_of(CapturedLoop, session, [5])
    expected = run(session, loop, slots)
    every = {"logit_bias": {5: 30.0}, "top_k": 2, "top_p": 0.1, "min_p": 0.5, "logprobs": True, "top_logprobs": 20}
    every |= {"repetition_penalty": 2.0, "repeated": (5, 6)}
    every |= {"infill": [[5], 1, [6]], "first": [5, 40]}
    assert run(session, loop, slots, (every,)) != expected
    assert run(session, loop, slots) == expected
    assert loop.logprobs(slots[0]) is None
    run(session, loop, slots, ({"logit_bias": {6: 1.0}, "repetition_penalty": 2.0, "repeated": (6, 7)},))
    adjustment = loop._tables.adjustment(torch.tensor(slots))
    assert (adjustment.bias[slots[0]].count_nonzero(), adjustment.repeated[slots[0], 0]) == (1, (1 << 6) + (1 << 7))
    assert not loop._tables._num_first.any()


def test_the_plan_holds_what_a_loop_keeps(session):
    """Of each slot, and of the idle row."""
    manifest = session.manifest
    loop, _ = loop_of(CapturedLoop, session, [30, 5, 41])
    tables = vars(loop._tables).values()
    kept = [*vars(loop).values(), *tables, *loop._tables.filters, *loop._tables.logprob_tables]
    kept_bytes = sum(each.nbytes for each in kept if isinstance(each, torch.Tensor) and len(each) in (5, 10))
    planned = 5 * state_bytes(manifest.model, manifest.build)
    assert 0.9 * planned < kept_bytes <= planned


def test_a_neighbour_with_extras_changes_no_bit_of_a_row(session):
    """Its state after two steps."""

    def after_two_steps(*extras: dict) -> list[torch.Tensor]:
        loop, slots = loop_of(CapturedLoop, session, [30, 5, 41])
        defaults = GenerationDefaults.from_json({"eos_token_id": []})
        for slot, extra in zip(slots, ({"seed": 3}, *extras), strict=False):
            loop.start_canvas(slot, 0, SamplingConfig(**{"seed": 4, "confidence_threshold": 0, **extra}).resolve(defaults))
        for _ in range(2):
            loop.step(slots[: 1 + len(extras)])
        return [state[slots[0]] for state in (loop._soft_embeds, loop._canvas, loop._argmax)]

    every = {"logit_bias": {5: 3.0}, "top_k": 30, "top_p": 0.9, "logprobs": True, "top_logprobs": 5}
    assert all(torch.equal(*pair) for pair in zip(after_two_steps(every, {}), after_two_steps(), strict=True))


def test_a_prompt_that_is_all_in_the_prefix_cache(session):
    """Its page table reaches the device although nothing of it is encoded. The device is one beside the host, as a GPU is."""

    def after_one_step(kind) -> list[int]:
        loop, [ended] = loop_of(kind, session, [8])
        cache = loop._cache
        cache.device_tables = {layer_type: table.clone() for layer_type, table in cache.device_tables.items()}
        keys: list[bytes] = []
        extend_page_keys(keys, range(20, 68), cache.page_size)
        generator = torch.Generator().manual_seed(1)
        new_kv = [torch.randn(48, 2, *pages.shape[3:], generator=generator) for pages in cache.pages]
        cache.append([cache.open(48)], [48], new_kv, page_keys=[keys])
        cache.close(ended)
        again = cache.open(64, page_keys=keys)
        assert (again, cache.length[again]) == (ended, 48)
        loop.start_canvas(again, 0, SamplingConfig(seed=1).resolve(GenerationDefaults.from_json({"eos_token_id": []})))
        loop.step([again])
        return loop.argmax_canvas(again)

    assert after_one_step(CapturedLoop) == after_one_step(CanvasLoop)


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["prefix cache", "no prefix cache"])
def test_new_tokens_go_with_steps(prefix_cache, tmp_path, monkeypatch):
    """Requests of several canvases, which come one after the other, get the tokens that they get where every encode pass goes
    alone; of those most of the passes are gone."""
    checkpoint = random_checkpoint(tmp_path, seed=8)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))

    def tokens_of(session) -> tuple[list[list[int]], Counter]:
        calls, limits = Counter(), EngineLimits(max_sequences=3, prefix_cache=prefix_cache)
        for name in ("encode", "denoise", "mixed"):
            counted(session, name, calls, monkeypatch)
        scheduler, sent = Engine(session, tokenizer, DEFAULTS, limits).scheduler, []
        for index, length in enumerate((3, 40, 16, 1, 33)):
            sampling = {"seed": index, "max_denoising_steps": 2 + index % 3, "max_tokens": 20 + 8 * index}
            sent.append(add(scheduler, [*prompt_of(20, 0)][: index * 8] + prompt_of(length, index), **sampling)[1])
            scheduler.tick()
        run_all(scheduler)
        return [each.token_ids for each in sent], calls

    expected, apart = tokens_of(network_session(checkpoint, page_size=8, max_encode_tokens=64))
    monkeypatch.setattr(engine, "_canvas_loop", lambda session, cache, *_: CapturedLoop(session, cache))
    tokens, calls = tokens_of(network_session(checkpoint, page_size=8, max_encode_tokens=64, mixed=True))
    assert tokens == expected
    assert calls["mixed"] > apart["encode"] // 2 and calls["mixed"] + calls["encode"] == apart["encode"]
    assert calls["mixed"] + calls["denoise"] == apart["denoise"]


def counted(session, name: str, calls: Counter, monkeypatch) -> None:
    program = getattr(session, name)
    monkeypatch.setattr(session, name, lambda *given, **named: calls.update([name]) or program(*given, **named))
