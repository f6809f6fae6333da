"""The scheduler: what a request's tokens do not depend on, who waits for whom, what fails alone, what is sent and measured."""

import random
from dataclasses import dataclass, field

import pytest
import torch
from small_checkpoints import network_session, random_checkpoint
from tokenizers import Tokenizer

from backend.canvas_loop import CanvasLoop
from backend.encode_budget import encode_budget, share_encode_budget
from backend.encode_pass import encode_new_tokens
from backend.engine import Engine, EngineLimits
from backend.errors import RequestError
from backend.generation_defaults import GenerationDefaults
from backend.job import CanvasOutput, DraftOutput
from backend.metrics import Series
from backend.sampling_config import SamplingConfig
from backend.scheduler import Scheduler

CANVAS = 16
DEFAULTS = GenerationDefaults.from_json({"max_denoising_steps": 4, "eos_token_id": []})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("random"), seed=8, max_position_embeddings=32_768)


def scheduler_of(checkpoint, *, max_encode_tokens: int = 64, **limits) -> Scheduler:
    session = network_session(checkpoint, page_size=8, max_encode_tokens=max_encode_tokens)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return Engine(session, tokenizer, DEFAULTS, EngineLimits(**limits)).scheduler


class MixingLoop(CanvasLoop):
    """Takes new tokens along as a `CapturedLoop` does, whose pass the two here are."""

    can_mix = True
    num_mixed = 0

    def step(self, slots, new_tokens=None):
        if new_tokens:
            self.num_mixed += 1
            encode_new_tokens(self._session, self._cache, [new_tokens], keep_pages=True)
        return super().step(slots)


@dataclass
class Sent:
    """What one request was sent."""

    outputs: list[CanvasOutput] = field(default_factory=list)
    drafts: list[DraftOutput] = field(default_factory=list)
    error: RequestError | None = None

    def __call__(self, output) -> None:
        if isinstance(output, RequestError):
            self.error = output
        else:
            (self.drafts if isinstance(output, DraftOutput) else self.outputs).append(output)

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def ended(self) -> bool:
        return self.error is not None or bool(self.outputs and self.outputs[-1].finish_reason)


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(20, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def add(scheduler: Scheduler, prompt: list[int], *, draft_interval_s: float | None = None, **sampling):
    resolved = SamplingConfig(**{"seed": 1, "max_tokens": 40, **sampling}).resolve(DEFAULTS)
    scheduler.check(prompt, resolved)
    sent = Sent()
    return scheduler.add(prompt, resolved, sent, draft_interval_s=draft_interval_s), sent


def run(scheduler: Scheduler) -> None:
    while not scheduler.is_idle:
        scheduler.tick()


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    sampling: dict

    def add(self, scheduler: Scheduler):
        return add(scheduler, list(self.prompt), **self.sampling)


def requests_of(count: int) -> list[Request]:
    """Half of them begin alike, as chats with one system prompt do."""
    rng, system = random.Random(5), tuple(prompt_of(70, seed=0))
    requests = []
    for index in range(count):
        begin = system[: rng.choice((70, 64, 33))] if index % 2 else ()
        prompt = begin + tuple(prompt_of(rng.choice((1, 2, 7, 30, 90)), seed=index))
        sampling = {
            "seed": index,
            "max_tokens": rng.choice((5, 16, 33)),
            "max_denoising_steps": rng.randint(1, 4),
            "temperature": rng.choice((0, 1)),
        }
        requests.append(Request(prompt, sampling))
    return requests


@pytest.fixture(scope="module")
def alone(checkpoint) -> list[tuple[Request, list[int]]]:
    """80 requests and their tokens, each alone in an empty engine without a prefix cache."""
    scheduler, results = scheduler_of(checkpoint, prefix_cache=False), []
    for request in requests_of(80):
        _, sent = request.add(scheduler)
        run(scheduler)
        results.append((request, sent.token_ids))
    return results


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(
    ("seed", "loop", "most_at_once"), [(1, CanvasLoop, 64), (2, CanvasLoop, 64), (3, MixingLoop, 6)], ids=["1", "2", "mixing"]
)
def test_tokens_do_not_depend_on_the_batch(seed, loop, most_at_once, prefix_cache, checkpoint, alone, monkeypatch):
    """Up to 64 at once that join and leave at random; every fifth is cancelled on its way; pages are too few for all. Where
    there are up to 6, new tokens go with a step, if one row alone waits for them."""
    monkeypatch.setattr("backend.engine.CanvasLoop", loop)
    rng, few = random.Random(seed), most_at_once < 64
    scheduler = scheduler_of(
        checkpoint,
        max_sequences=most_at_once,
        max_cached_tokens=300 if few else 5000,
        prefix_cache=prefix_cache,
        max_pass_rows=20 * CANVAS,
    )
    waiting, running, most = rng.sample(alone, len(alone)), [], 0
    while waiting or not scheduler.is_idle:
        for _ in range(rng.choice((0, 1, 1 if few else 30))):
            if waiting:
                request, expected = waiting.pop()
                running.append((*request.add(scheduler), expected))
        scheduler.tick()
        most = max(most, scheduler.num_active)
        for job, sent, _ in running[::5]:
            if not sent.ended and rng.random() < (0.05 if few else 0.3):
                scheduler.cancel(job)
    assert most > most_at_once / 2
    assert not few or scheduler._loop.num_mixed > 10
    cancelled = [sent for _, sent, _ in running if sent.outputs[-1].finish_reason == "cancelled"]
    assert 3 < len(cancelled) <= 16
    for _, sent, expected in running:
        if sent not in cancelled:
            assert sent.token_ids == expected
    counters = scheduler.metrics.drain().counters
    assert counters[Series("requests_total", "cancelled")] == len(cancelled)
    assert (counters.get(Series("prefix_cache_hit_tokens_total"), 0) > 500) == prefix_cache


def test_a_short_prompt_waits_for_no_more_than_one_chunk_of_a_long_one(checkpoint):
    scheduler = scheduler_of(checkpoint, max_encode_tokens=2048, max_cached_tokens=40_000)
    long, _ = add(scheduler, prompt_of(16_384, seed=1))
    scheduler.tick()
    assert long.num_pending == 16_384 - 2048
    _, sent = add(scheduler, prompt_of(100, seed=2), max_denoising_steps=1)
    scheduler.tick()
    assert sent.outputs[0].canvas_index == 0
    assert long.num_pending == 16_384 - 2 * 2048 + 100
    scheduler.tick()  # and its commit does not wait either
    assert sent.outputs[1].canvas_index == 1
    scheduler.fail_all(RequestError("CANCELLED", "enough"))


@pytest.mark.parametrize(
    ("left", "since", "budget", "shares"),
    [
        ([], [], 8, []),
        ([5], [0], 8, [5]),
        ([100], [0], 8, [8]),
        ([100, 3, 2], [0, 1, 1], 8, [4, 2, 2]),  # half for the oldest, then the fewest left first
        ([100, 1, 1], [0, 1, 1], 8, [6, 1, 1]),  # and what they leave
        ([100, 3, 3], [1, 1, 0], 8, [2, 3, 3]),
        ([100, 100], [1, 0], 7, [3, 4]),
    ],
)
def test_shares_of_a_pass_by_hand(left, since, budget, shares):
    assert share_encode_budget(left, since, budget) == shares


@pytest.mark.parametrize(("rows", "budget"), [(0, 2048), (16, 256), (256, 256), (1024, 1024), (16_384, 2048)])
def test_passes_between_steps_by_hand(rows, budget):
    assert encode_budget(2048, rows) == budget


def test_a_canvas_behind_a_long_prompt_waits_for_an_eighth_of_a_chunk_a_step(checkpoint):
    scheduler = scheduler_of(checkpoint, max_encode_tokens=2048, max_cached_tokens=40_000)
    long, _ = add(scheduler, prompt_of(16_384, seed=1))
    _, sent = add(scheduler, prompt_of(100, seed=2), max_denoising_steps=4, confidence_threshold=0)
    scheduler.tick()
    encoded = [16_384 - long.num_pending]
    while not sent.outputs:
        scheduler.tick()
        encoded.append(16_384 - long.num_pending)
    assert encoded == [1948, 2204, 2460, 2716]
    scheduler.fail_all(RequestError("CANCELLED", "enough"))


def test_no_row_starves_behind_short_ones():
    """A long prompt with short ones coming at every tick: done after what half of each pass allows."""
    left, ticks = 1000, 0
    while left:
        left -= share_encode_budget([64, left, 64], [ticks, 0, ticks], 64)[1]
        ticks += 1
    assert ticks == 32  # ceil(1000 / 32)


def test_nothing_overtakes_a_request_that_waits_for_pages(checkpoint):
    scheduler = scheduler_of(checkpoint, max_cached_tokens=200, prefix_cache=False)
    _, first = add(scheduler, prompt_of(100, seed=1))
    scheduler.tick()
    _, big = add(scheduler, prompt_of(150, seed=2))
    small = [add(scheduler, prompt_of(3, seed=seed), max_tokens=1, max_denoising_steps=1)[1] for seed in range(5)]
    while not first.ended:
        assert scheduler.num_active == 1 and not any(sent.ended for sent in (big, *small))
        scheduler.tick()
    run(scheduler)
    assert big.ended and all(sent.ended for sent in small)


def test_an_error_in_one_requests_text_ends_it_alone(checkpoint, alone):
    scheduler = scheduler_of(checkpoint, max_sequences=4)
    added = [request.add(scheduler) for request, _ in alone[:4]]

    def broken(*_, **__):
        raise KeyError("a token that the tokenizer does not know")

    added[1][0].text.push = broken
    run(scheduler)
    assert str(added[1][1].error) == "internal error in this request; see the server's log"
    assert [sent.token_ids for _, sent in added[2:]] == [tokens for _, tokens in alone[2:4]]
    counters = scheduler.metrics.drain().counters
    assert counters[Series("requests_total", "failed")] == 1
    assert counters[Series("requests_total", "success")] == 3


def test_a_canvas_that_cannot_start_takes_no_new_tokens_along(checkpoint, alone, monkeypatch):
    """Its request ends, before anything of it is encoded; the one beside it goes on."""
    monkeypatch.setattr("backend.engine.CanvasLoop", MixingLoop)
    scheduler = scheduler_of(checkpoint, max_sequences=2, prefix_cache=False)
    (request, tokens), (other, _) = [each for each in alone if len(each[0].prompt) <= CANVAS < len(each[1])][:2]
    _, sent = request.add(scheduler)
    scheduler.tick()
    job, refused = other.add(scheduler)

    def opening(vocab_size):
        raise RequestError("INVALID_ARGUMENT", "no such beginning")

    job.opening = opening
    scheduler.tick()
    assert str(refused.error) == "no such beginning" and scheduler._loop.num_mixed == 1
    run(scheduler)
    assert sent.token_ids == tokens


def test_an_on_output_that_raises_ends_its_request_alone(checkpoint, alone):
    scheduler, (request, _) = scheduler_of(checkpoint), alone[0]

    def broken(_):
        raise OSError("the connection is gone")

    resolved = SamplingConfig(seed=1, max_tokens=40).resolve(DEFAULTS)
    scheduler.add(list(request.prompt), resolved, broken)
    _, sent = alone[1][0].add(scheduler)
    run(scheduler)
    assert sent.token_ids == alone[1][1]


def test_numbers_that_are_not_finite_end_their_request_alone(checkpoint, alone):
    scheduler = scheduler_of(checkpoint)
    (request, expected), prompt = alone[0], prompt_of(30, seed=9)
    (job, broken), (_, other) = add(scheduler, prompt, max_denoising_steps=40), request.add(scheduler)
    while job.slot < 0 or job.is_encoding:
        scheduler.tick()
    scheduler._loop._soft_embeds[job.slot] = torch.nan
    run(scheduler)
    assert broken.error.code == "INTERNAL" and "numbers are not finite" in str(broken.error) and not broken.outputs
    assert other.token_ids == expected
    assert not scheduler.num_active and not any(scheduler._cache.num_pages_used.values())


@pytest.mark.parametrize("program", ["encode", "denoise", "head"])
def test_a_failed_device_step_ends_what_is_in_flight_and_no_more(program, checkpoint, alone, monkeypatch):
    scheduler = scheduler_of(checkpoint, max_sequences=2, max_encode_tokens=512)
    added = [request.add(scheduler) for request, _ in alone[:4]]

    def broken(*_):
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    with monkeypatch.context() as patch:
        patch.setattr(scheduler._session, program, broken)
        scheduler.tick()
        assert scheduler.num_failed_steps == 1
    for _, sent in added[:2]:
        assert str(sent.error) == "device step failed: CUDA error: out of memory; send the request again"
        assert sent.error.code == "INTERNAL"
    run(scheduler)
    assert [sent.token_ids for _, sent in added[2:]] == [tokens for _, tokens in alone[2:4]]
    again = [request.add(scheduler)[1] for request, _ in alone[:2]]
    run(scheduler)
    assert [sent.token_ids for sent in again] == [tokens for _, tokens in alone[:2]]
    assert scheduler.num_failed_steps == 0
    assert set(scheduler._cache.num_pages_used.values()) == {0}


def test_drafts_are_what_the_canvas_would_add_if_it_ended_there(checkpoint):
    """At a constant temperature step n of many is step n of n, so each draft has an output to be equal to."""
    sampling = {"t_min": 0.6, "t_max": 0.6, "confidence_threshold": 0, "max_tokens": 12, "stop": ("5", "a b")}
    prompt, scheduler = prompt_of(20, seed=3), scheduler_of(checkpoint, prefix_cache=False)
    _, sent = add(scheduler, prompt, draft_interval_s=0, max_denoising_steps=6, **sampling)
    run(scheduler)
    assert [(draft.canvas_index, draft.step) for draft in sent.drafts] == [(0, step) for step in range(1, 6)]
    for draft in sent.drafts:
        _, ended = add(scheduler, prompt, max_denoising_steps=draft.step, **sampling)
        run(scheduler)
        assert (draft.text, draft.token_ids) == (ended.outputs[0].text, ended.outputs[0].token_ids)
    _, silent = add(scheduler, prompt, max_denoising_steps=6, **sampling)
    run(scheduler)
    assert not silent.drafts and silent.outputs == sent.outputs


def test_drafts_come_no_more_often_than_asked_for(checkpoint):
    scheduler, now = scheduler_of(checkpoint), [0.0]
    scheduler._clock = lambda: now[0]
    _, sent = add(scheduler, prompt_of(9, seed=1), draft_interval_s=2.5, max_denoising_steps=10, confidence_threshold=0)
    while not sent.outputs:
        scheduler.tick()
        now[0] += 1.0
    assert [draft.step for draft in sent.drafts] == [1, 4, 7]
    scheduler.fail_all(RequestError("CANCELLED", "enough"))


def test_what_is_measured(checkpoint):
    scheduler, now = scheduler_of(checkpoint, max_sequences=1, prefix_cache=False), [10.0]
    scheduler._clock = lambda: now[0]
    fixed = {"max_denoising_steps": 3, "confidence_threshold": 0}
    add(scheduler, prompt_of(9, seed=1), max_tokens=20, **fixed)
    waiting, _ = add(scheduler, prompt_of(5, seed=2), **fixed)
    scheduler.tick()
    assert scheduler.metrics.drain().gauges == {
        Series("active_requests"): 1,
        Series("kv_pages", "sliding_attention"): scheduler._cache.num_pages["sliding_attention"],
        Series("kv_pages", "full_attention"): scheduler._cache.num_pages["full_attention"],
        Series("kv_pages_used", "sliding_attention"): 2,
        Series("kv_pages_used", "full_attention"): 2,
        Series("kv_pages_cached", "sliding_attention"): 0,
        Series("kv_pages_cached", "full_attention"): 0,
    }
    now[0] += 4
    scheduler.fail(waiting, RequestError("DEADLINE_EXCEEDED", "queue: waited too long"))
    run(scheduler)
    delta = scheduler.metrics.drain()
    assert delta.counters == {
        Series("requests_total", "rejected"): 1,
        Series("requests_total", "success"): 1,
        Series("output_tokens_total"): 20,
    }
    sums = {series.name: (sum(each.counts), each.sum) for series, each in delta.histograms.items()}
    assert sums == {"canvas_steps": (2, 6), "canvas_seconds": (2, 4.0), "first_canvas_seconds": (1, 4.0)}
