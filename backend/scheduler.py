"""The scheduler: one owner of the session that turns requests into tokens, one tick at a time.

A request's life: queued → encoding its prompt, chunk by chunk → denoising a canvas → committing it (one more encode) →
the next canvas … → finished. At each tick:

1. Admit from the queue what the free slots and KV pages hold, strictly first come first served: nothing overtakes a request
   that waits for pages. What the prefix cache has of a prompt is not encoded again.
2. Encode: commits and prompts, packed into one pass of at most `max_encode_tokens`; `encode_budget` says who goes first.
3. One denoising step of every row that has a canvas, in passes of at most `max_pass_rows` rows, so that the memory of a pass
   does not grow with the number of sequences. Where the loop takes new tokens, those that one row alone waits for are not
   encoded before, but go with its next step, which reads the weights for both.
4. Rows whose canvas is finished: trim, send, and finish or commit. The others send drafts, if the request wants them.

A canvas that ends its request is not committed: that would cost an encode pass now, and a next turn that goes on from it
encodes those tokens, one canvas at most, together with its own. With `commit_last` it is, up to its end, once its output is
sent.

A row's failure is its own: an error in its text, in its `on_output`, or numbers that are not finite end that request. A device
step that fails ends every request in flight; those in the queue stay, and the next tick starts clean.

Not thread-safe: it is called by one thread, the engine worker's (`worker.py`) or that of an `LLM` (`llm.py`).
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from tokenizers import Tokenizer

from backend.admission import check_images, check_request, most_cached_tokens
from backend.answer_grammar import Grammars
from backend.canvas_loop import CanvasLoop
from backend.encode_budget import next_pass, one_for_a_step
from backend.encode_pass import NewTokens, encode_new_tokens
from backend.errors import RequestError
from backend.images.placeholders import image_spans
from backend.images.preprocess import ImagePatches
from backend.job import CanvasOutput, Job, OnOutput
from backend.kv_cache import PagedKVCache
from backend.metrics import MetricValues, Outcome
from backend.prefix_cache import extend_page_keys
from backend.sampling_config import ResolvedSampling
from backend.session import Session
from backend.text_stream import EVERYWHERE, StopScope, TextStream

_logger = logging.getLogger(__name__)


class Scheduler:
    """See the module docstring. The order of rows in a batch is the order of admission."""

    def __init__(
        self,
        session: Session,
        cache: PagedKVCache,
        loop: CanvasLoop,
        tokenizer: Tokenizer,
        *,
        grammars: Grammars | None = None,
        prefix_cache: bool = True,
        commit_last: bool = False,
        max_pass_rows: int | None = None,
        metrics: MetricValues | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`grammars`: None where no request has any. `max_pass_rows`: canvas positions that one denoising pass takes, at least
        one canvas; None takes all in one."""
        session.bind_pages(cache.pages)
        self.metrics, self._grammars = metrics or MetricValues(), grammars
        self.num_failed_steps = 0
        """Device steps in a row that failed: a server whose device does not recover can tell by it."""
        self._session, self._cache, self._loop, self._tokenizer, self._clock = session, cache, loop, tokenizer, clock
        # A batch-invariant engine shares prompts alone: where an answer is a part of one, its canvases are cut elsewhere.
        self._share_answers = prefix_cache and not session.manifest.build.batch_invariant
        # Without the cache nobody would read the last canvas.
        self._prefix_cache, self._commit_last = prefix_cache, commit_last and self._share_answers
        self._canvas_length = session.manifest.model.canvas_length
        self._max_pass_sequences = max(1, max_pass_rows // self._canvas_length) if max_pass_rows else len(cache.length)
        self._queue: deque[Job] = deque()
        self._active: list[Job] = []
        self._num_ticks = 0

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def is_idle(self) -> bool:
        return not self._queue and not self._active

    def check(self, prompt_ids: Sequence[int], sampling: ResolvedSampling, *, images: Sequence[ImagePatches] = ()) -> None:
        """Refuses what can never be served; see `check_request`. Safe to call from any thread."""
        manifest = self._session.manifest
        check_request(manifest.model, self._cache, prompt_ids, sampling, commit_last=self._commit_last)
        check_images(manifest, prompt_ids, images)

    def add(
        self,
        prompt_ids: Sequence[int],
        sampling: ResolvedSampling,
        on_output: OnOutput,
        *,
        images: Sequence[ImagePatches] = (),
        stop_scope: StopScope = EVERYWHERE,
        draft_interval_s: float | None = None,
        added_at: float | None = None,
    ) -> Job:
        """Queues a request that passed `check`; `on_output` is called once a canvas, at last with a finish_reason or error.
        Raises RequestError for a grammar that the tokenizer has no tokens for.

        images: those of the prompt, whose placeholders are expanded (`backend.images.placeholders`).
        stop_scope: where in the result stop strings are looked for.
        draft_interval_s: send DraftOutputs of canvases that are not finished yet, at most one in this time (seconds; 0 after
        every denoising step); None sends none. Drafts change no result.
        added_at: by the clock, when the request came, if not now.
        """
        job = Job(
            prompt_ids=list(prompt_ids),
            images=images,
            image_spans=image_spans(prompt_ids, images, self._session.manifest.model),
            sampling=sampling,
            on_output=on_output,
            text=TextStream(
                self._tokenizer, stop=sampling.stop, skip_special_tokens=sampling.skip_special_tokens, stop_scope=stop_scope
            ),
            grammar=self._grammars.answer(sampling) if sampling.grammar else None,
            draft_interval_s=draft_interval_s,
            added_at=self._clock() if added_at is None else added_at,
            prefix=list(prompt_ids),
        )
        if self._prefix_cache:
            extend_page_keys(job.page_keys, job.prefix, self._cache.page_size, job.image_spans)
        self._queue.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """Ends a request now: its pages are free, and its last output says "cancelled". Nothing happens if it has ended."""
        if self._remove(job):
            self._end(job, "cancelled", job.output("", slice(0), 0, "cancelled"))

    def fail(self, job: Job, error: RequestError) -> None:
        """Ends a request with an error. Nothing happens if it has ended."""
        if self._remove(job):
            self._end(job, "rejected" if job.slot < 0 else "failed", error)

    def fail_all(self, error: RequestError) -> None:
        """Ends every request, active or queued."""
        self._fail_each([*self._queue, *self._active], error)

    def _fail_each(self, jobs: Sequence[Job], error: RequestError) -> None:
        for job in jobs:
            if job.ended:
                self._leave(job)
            self.fail(job, error)

    def _remove(self, job: Job) -> bool:
        """Takes a request out of the queue or the batch; False if it has ended."""
        if job.ended:
            return False
        if job in self._queue:
            self._queue.remove(job)
        elif job in self._active:
            self._leave(job)
        else:
            return False
        return True

    def _leave(self, job: Job) -> None:
        self._active.remove(job)
        self._cache.close(job.slot)

    def _end(self, job: Job, outcome: Outcome, output: CanvasOutput | RequestError) -> None:
        job.ended = True
        self.metrics.count("requests_total", 1, outcome)
        try:
            job.on_output(output)
        except Exception:  # of the caller's function: whatever it is, the other requests go on
            _logger.exception("a request's on_output failed at its end; the others go on")

    def tick(self) -> None:
        """One round of the module docstring's four steps; does nothing when idle."""
        self._num_ticks += 1
        try:
            self._admit()  # 1.
            new_tokens = self._encode([job for job in self._active if job.is_encoding])  # 2.
            stepped = self._denoise([job for job in self._active if not job.is_encoding], new_tokens)  # 3.
        except RuntimeError as error:  # PyTorch's and CUDA's errors, out of memory among them
            self._fail_step(error)
        else:
            self.num_failed_steps = 0
            for deliver in stepped:  # 4.
                deliver()
        self._set_gauges()

    def _fail_step(self, problem: RuntimeError) -> None:
        self.num_failed_steps += 1
        _logger.exception("a device step failed; every request in flight ends with an error")
        first_line = str(problem).partition("\n")[0]
        error = RequestError("INTERNAL", f"device step failed: {first_line}; send the request again")
        self._fail_each(list(self._active), error)

    def _admit(self) -> None:
        while self._queue:
            job = self._queue[0]
            length, known = self._canvas_length, {"page_keys": job.page_keys, "images": job.image_spans}
            num_tokens = most_cached_tokens(len(job.prompt_ids), job.sampling, length, commit_last=self._commit_last)
            if not self._cache.fits(num_tokens, **known):
                return
            job.slot = self._cache.open(num_tokens, **known)
            self._active.append(self._queue.popleft())
            job.num_cached_tokens = self._cache.length[job.slot]
            self._wait_for_encode(job, len(job.prefix) - job.num_cached_tokens)
            self.metrics.observe("queue_seconds", self._clock() - job.added_at)
            self.metrics.count("input_tokens_total", len(job.prefix))
            if self._prefix_cache:
                self.metrics.count("prefix_cache_lookup_tokens_total", len(job.prefix))
                self.metrics.count("prefix_cache_hit_tokens_total", job.num_cached_tokens)

    def _wait_for_encode(self, job: Job, num_pending: int) -> None:
        """The last tokens of the job's prefix are to be encoded; with none to encode its canvas starts."""
        job.num_pending, job.waiting_since = num_pending, self._num_ticks
        if not num_pending:
            self._start_canvas(job)

    def _start_canvas(self, job: Job) -> None:
        try:
            opening = job.opening(self._session.manifest.model.vocab_size)
        except RequestError as error:
            self.fail(job, error)
        else:
            self._loop.start_canvas(job.slot, job.canvas_index, job.canvas_sampling, opening)
            job.canvas_started_at = self._clock()

    def _encode(self, waiting: list[Job]) -> NewTokens | None:
        """Encodes, or returns what is to be encoded with the next step."""
        fits = self._loop.can_mix and len(self._active) <= self._max_pass_sequences
        if fits and (job := one_for_a_step(waiting, self._canvas_length)):
            new_tokens, job.num_pending = NewTokens.of(job, job.num_pending), 0
            self._start_canvas(job)
            return None if job.ended else new_tokens
        num_canvas_rows = (len(self._active) - len(waiting)) * self._canvas_length
        packed = next_pass(waiting, num_canvas_rows, self._session.manifest.build)
        if new := [NewTokens.of(job, count) for job, count in packed]:
            encode_new_tokens(self._session, self._cache, new, keep_pages=self._prefix_cache)
        for job, count in packed:
            job.num_pending -= count
            if not job.num_pending and job.ended:
                self._leave(job)
            elif not job.num_pending:
                self._start_canvas(job)
        return None

    def _denoise(self, rows: list[Job], new_tokens: NewTokens | None) -> list[Callable[[], None]]:
        """One step of each row, `new_tokens` with it; returns what is to be done about the rows once all have made it."""
        stepped: list[Callable[[], None]] = []
        for start in range(0, len(rows), self._max_pass_sequences):
            group = rows[start : start + self._max_pass_sequences]
            for job, state in zip(group, self._loop.step([job.slot for job in group], new_tokens), strict=True):
                if state or job.draft_is_due(self._clock()):
                    deliver = (self._send_draft, self._finish_canvas, _refuse_canvas)[state]
                    canvas, num_steps = self._loop.argmax_canvas(job.slot), self._loop.num_steps(job.slot)
                    stepped.append(partial(self._isolated, deliver, job, canvas, num_steps))
        return stepped

    def _isolated(self, deliver: Callable[[Job, list[int], int], None], job: Job, canvas: list[int], num_steps: int) -> None:
        """Calls `deliver` unless the request has ended since; an error in it ends this request alone."""
        if job.ended:
            return
        try:
            deliver(job, canvas, num_steps)
        except RequestError as error:
            self.fail(job, error)
        except Exception:  # of the request's text or of the caller's on_output: whatever it is, the other requests go on
            _logger.exception("a request failed; the others go on")
            self.fail(job, RequestError("INTERNAL", "internal error in this request; see the server's log"))

    def _send_draft(self, job: Job, canvas: list[int], num_steps: int) -> None:
        job.drafted_at = self._clock()
        if draft := job.draft(canvas, num_steps):
            job.on_output(draft)

    def _finish_canvas(self, job: Job, canvas: list[int], num_steps: int) -> None:
        """Trims the finished canvas, sends what is new, and ends the request or has the canvas committed."""
        num_before, is_first = len(job.tokens), job.canvas_index == 0
        output = job.finish_canvas(canvas, num_steps, self._loop.logprobs(job.slot))
        self.metrics.observe("canvas_steps", num_steps)
        self.metrics.observe("canvas_seconds", self._clock() - job.canvas_started_at)
        if is_first:
            self.metrics.observe("first_canvas_seconds", self._clock() - job.added_at)
        self.metrics.count("output_tokens_total", len(output.token_ids))
        if output.finish_reason is None:
            self._commit(job, job.tokens[num_before:])
            job.on_output(output)
        elif self._commit_last:
            # With the token that ended it, which the next turn's prompt has too; a grammar that is complete needs none.
            kept = job.tokens[num_before:]
            self._commit(job, (kept or canvas[:1]) if job.grammar else canvas[: len(kept) + 1])
            self._end(job, "success", output)
        else:
            self._leave(job)
            self._end(job, "success", output)

    def _commit(self, job: Job, canvas: list[int]) -> None:
        job.prefix += canvas
        if self._share_answers:
            extend_page_keys(job.page_keys, job.prefix, self._cache.page_size, job.image_spans)
        self._wait_for_encode(job, len(canvas))

    def _set_gauges(self) -> None:
        self.metrics.set("active_requests", len(self._active))
        self.metrics.set_each("kv_pages", self._cache.num_pages)
        self.metrics.set_each("kv_pages_used", self._cache.num_pages_used)
        self.metrics.set_each("kv_pages_cached", self._cache.num_pages_kept)


def _refuse_canvas(*_) -> NoReturn:
    raise RequestError("INTERNAL", "the model's numbers are not finite; check the checkpoint's weights, and the device")
