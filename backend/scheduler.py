"""The scheduler: one owner of the session that turns requests into tokens, one tick at a time.

A request's life: queued → encoding its prompt, chunk by chunk → denoising a canvas → committing it (one more encode) →
the next canvas … → finished. At each tick:

1. Admit from the queue, first come first served, what the free slots and KV pages hold.
2. Encode: commits and prompts, packed, at most `max_encode_tokens` in all: a long prompt delays others by one chunk only.
3. One denoising step of every row that has a canvas.
4. Rows whose canvas is finished: trim, send, and finish or commit. A canvas that ends its request is not committed.

Not thread-safe: `service.py` gives it a thread, `llm.py` calls it directly.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer

from backend.canvas_loop import CanvasLoop
from backend.errors import RequestError
from backend.kv_cache import PagedKVCache
from backend.sampling_config import ResolvedSampling
from backend.session import Session
from backend.text_stream import TextStream


@dataclass(frozen=True, kw_only=True)
class CanvasOutput:
    """What one finished canvas adds to a request.

    text: new text, complete characters, stop strings cut. token_ids: new tokens, cut at max_tokens, before the first
    end-of-sequence or stop token and at a stop string; tokens whose text is not decided yet come with a later canvas.
    num_steps: denoising steps of this canvas. finish_reason: None until the last output, then "stop", "length" or "cancelled".
    """

    text: str
    token_ids: list[int]
    canvas_index: int
    num_steps: int
    finish_reason: str | None
    num_prompt_tokens: int


OnOutput = Callable[[CanvasOutput | RequestError], None]


@dataclass(kw_only=True, eq=False)
class Job:
    """One request. `pending`: tokens that are not in the cache yet, of the prompt or of a canvas to commit. `tokens`: the
    result so far, of which the first `num_sent` have been sent."""

    prompt_ids: list[int]
    sampling: ResolvedSampling
    on_output: OnOutput
    text: TextStream
    slot: int = -1
    pending: list[int] = field(default_factory=list)
    canvas_index: int = 0
    tokens: list[int] = field(default_factory=list)
    num_sent: int = 0

    @property
    def is_encoding(self) -> bool:
        return bool(self.pending)


class Scheduler:
    """See the module docstring. The order of rows in a batch is the order of admission."""

    def __init__(self, session: Session, cache: PagedKVCache, loop: CanvasLoop, tokenizer: Tokenizer):
        session.bind_pages(cache.pages)
        self._session, self._cache, self._loop, self._tokenizer = session, cache, loop, tokenizer
        self._canvas_length = session.manifest.model.canvas_length
        self._queue: deque[Job] = deque()
        self._active: list[Job] = []

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def is_idle(self) -> bool:
        return not self._queue and not self._active

    def check(self, prompt_ids: Sequence[int], sampling: ResolvedSampling) -> None:
        """Refuses what can never be served; safe to call from any thread.

        Raises:
            RequestError INVALID_ARGUMENT: no tokens, one outside the vocabulary, or more than there are positions or pages.
        """
        model = self._session.manifest.model
        if not prompt_ids:
            raise RequestError(
                "INVALID_ARGUMENT", "prompt: got no tokens, expected at least one; send a prompt that is not empty"
            )
        bad = next((token for token in prompt_ids if not 0 <= token < model.vocab_size), None)
        if bad is not None:
            raise RequestError("INVALID_ARGUMENT", f"prompt: got token id {bad}, expected 0 to {model.vocab_size - 1}")
        if model.image_token_id in prompt_ids:
            raise RequestError(
                "INVALID_ARGUMENT",
                f"prompt: got image token {model.image_token_id}, but images are not supported yet; remove it",
            )
        canvases = -(-sampling.max_tokens // self._canvas_length)
        total = len(prompt_ids) + canvases * self._canvas_length
        if total > model.max_position_embeddings:
            raise RequestError(
                "INVALID_ARGUMENT",
                f"prompt: got {len(prompt_ids)} tokens and max_tokens {sampling.max_tokens} ({canvases} canvases of "
                f"{self._canvas_length}), expected at most {model.max_position_embeddings} in all; "
                "shorten the prompt or lower max_tokens",
            )
        if not self._cache.fits(self._cached_tokens(len(prompt_ids), sampling), when_empty=True):
            raise RequestError(
                "INVALID_ARGUMENT",
                f"prompt: got {len(prompt_ids)} tokens and max_tokens {sampling.max_tokens}, which need more KV pages than "
                "this server has in all; shorten the prompt or lower max_tokens",
            )

    def add(self, prompt_ids: Sequence[int], sampling: ResolvedSampling, on_output: OnOutput) -> Job:
        """Queues a request that passed `check`; `on_output` is called once a canvas, at last with a finish_reason or error."""
        text = TextStream(self._tokenizer, stop=sampling.stop, skip_special_tokens=sampling.skip_special_tokens)
        sequence = Job(prompt_ids=list(prompt_ids), sampling=sampling, on_output=on_output, text=text, pending=list(prompt_ids))
        self._queue.append(sequence)
        return sequence

    def cancel(self, sequence: Job) -> None:
        """Ends a request now: its pages are free, and its last output says "cancelled". Nothing happens if it has ended."""
        if self._remove(sequence):
            self._send(sequence, [], "", 0, "cancelled")

    def fail(self, sequence: Job, error: RequestError) -> None:
        """Ends a request with an error. Nothing happens if it has ended."""
        if self._remove(sequence):
            sequence.on_output(error)

    def _remove(self, sequence: Job) -> bool:
        """Takes a request out of the queue or the batch; False if it is in neither."""
        if sequence in self._queue:
            self._queue.remove(sequence)
        elif sequence in self._active:
            self._leave(sequence)
        else:
            return False
        return True

    def fail_all(self, error: RequestError) -> None:
        for sequence in [*self._queue, *self._active]:
            self.fail(sequence, error)

    def tick(self) -> None:
        """One round of the module docstring's four steps; does nothing when idle."""
        # 1.
        while self._queue and self._cache.fits(self._most_cached_tokens(self._queue[0])):
            sequence = self._queue.popleft()
            sequence.slot = self._cache.open(self._most_cached_tokens(sequence))
            self._active.append(sequence)
        # 2.
        encoding = [sequence for sequence in self._active if sequence.is_encoding]
        # Commits are short and their rows wait to go on: they go before prompts.
        self._encode(sorted(encoding, key=lambda sequence: sequence.canvas_index == 0))
        # 3.
        denoising = [sequence for sequence in self._active if not sequence.is_encoding]
        if denoising:
            finished = self._loop.step([sequence.slot for sequence in denoising])
            # 4.
            for sequence, is_finished in zip(denoising, finished, strict=True):
                if is_finished:
                    self._finish_canvas(sequence)

    def _most_cached_tokens(self, sequence: Job) -> int:
        return self._cached_tokens(len(sequence.prompt_ids), sequence.sampling)

    def _cached_tokens(self, num_prompt_tokens: int, sampling: ResolvedSampling) -> int:
        """The prompt and every canvas but the last, which is never committed."""
        canvases = -(-sampling.max_tokens // self._canvas_length)
        return num_prompt_tokens + (canvases - 1) * self._canvas_length

    def _encode(self, sequences: list[Job]) -> None:
        budget = self._session.manifest.build.max_encode_tokens
        packed: list[tuple[Job, list[int]]] = []
        for sequence in sequences:
            if budget == 0:
                break
            chunk = sequence.pending[:budget]
            budget -= len(chunk)
            packed.append((sequence, chunk))
        if not packed:
            return
        slots = [sequence.slot for sequence, _ in packed]
        counts = [len(chunk) for _, chunk in packed]
        lengths = [self._cache.length[slot] for slot in slots]
        starts = [sum(counts[:index]) for index in range(len(counts) + 1)]
        positions = [
            position for length, count in zip(lengths, counts, strict=True) for position in range(length, length + count)
        ]
        int32 = {"dtype": torch.int32}
        new_kv = self._session.encode(
            torch.tensor([token for _, chunk in packed for token in chunk], **int32),
            torch.tensor(positions, **int32),
            torch.tensor(starts, **int32),
            torch.tensor(lengths, **int32),
            self._cache.tables(slots),
        )
        self._cache.append(slots, counts, new_kv)
        for sequence, chunk in packed:
            del sequence.pending[: len(chunk)]
            if not sequence.pending:
                self._loop.start_canvas(sequence.slot, sequence.canvas_index, sequence.sampling)

    def _finish_canvas(self, sequence: Job) -> None:
        """Trims the finished canvas, sends what is new, and ends the request or queues the canvas to be committed."""
        canvas = self._loop.argmax_canvas(sequence.slot)
        num_steps = self._loop.num_steps(sequence.slot)
        tokens, reason = self._trim(canvas, sequence)
        sequence.tokens += tokens
        delta = sequence.text.push(tokens, last=reason is not None)
        if delta.stopped:
            reason = "stop"
        new_tokens = sequence.tokens[sequence.num_sent : delta.num_tokens]
        sequence.num_sent = delta.num_tokens
        if reason is None:
            sequence.pending = canvas
        else:
            self._leave(sequence)
        self._send(sequence, new_tokens, delta.text, num_steps, reason)
        sequence.canvas_index += 1

    def _trim(self, canvas: list[int], sequence: Job) -> tuple[list[int], str | None]:
        """The canvas up to max_tokens or the first end-of-sequence or stop token, which is not part of the result."""
        room = sequence.sampling.max_tokens - len(sequence.tokens)
        ends = {*sequence.sampling.eos_token_ids, *sequence.sampling.stop_token_ids}
        for index, token in enumerate(canvas[:room]):
            if token in ends:
                return canvas[:index], "stop"
        return canvas[:room], "length" if room <= len(canvas) else None

    def _leave(self, sequence: Job) -> None:
        self._active.remove(sequence)
        self._cache.close(sequence.slot)

    def _send(self, sequence: Job, tokens: list[int], text: str, num_steps: int, finish_reason: str | None) -> None:
        sequence.on_output(
            CanvasOutput(
                text=text,
                token_ids=tokens,
                canvas_index=sequence.canvas_index,
                num_steps=num_steps,
                finish_reason=finish_reason,
                num_prompt_tokens=len(sequence.prompt_ids),
            )
        )
