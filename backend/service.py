"""A running engine for many threads: requests in, outputs out, one scheduler thread in between."""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from backend.engine import Engine, EngineLimits
from backend.errors import RequestError
from backend.sampling_config import ResolvedSampling, SamplingConfig
from backend.scheduler import CanvasOutput, Job, OnOutput

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Entry:
    """A request as the service knows it: `job` is set once the scheduler has it."""

    prompt_ids: list[int]
    sampling: ResolvedSampling
    on_output: OnOutput
    queued_at: float
    job: Job | None = None
    started: bool = False


class Service:
    """Owns the scheduler's thread. Every method may be called from any thread.

    A request ends with exactly one last output: one with a finish_reason, or a RequestError.
    """

    def __init__(
        self,
        engine_dir: str | PathLike,
        *,
        max_sequences: int = 16,
        max_queued: int = 256,
        queue_timeout_s: float = 60,
        max_cached_tokens: int | None = None,
    ):
        """Loads the engine and starts the thread. `queue_timeout_s` bounds the time from `submit` to the first encoding.

        Raises:
            ManifestError, CheckpointError: the engine cannot be used.
        """
        self._engine = Engine.load(
            Path(engine_dir), EngineLimits(max_sequences=max_sequences, max_cached_tokens=max_cached_tokens)
        )
        self._max_queued, self._queue_timeout_s = max_queued, queue_timeout_s
        self._handles = itertools.count(1)
        self._entries: dict[int, _Entry] = {}
        self._inbox: deque[tuple[str, int]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def tokenizer(self):
        """The engine's `tokenizers.Tokenizer`."""
        return self._engine.tokenizer

    def submit(self, prompt: str | Sequence[int], sampling: SamplingConfig, on_output: Callable[..., None]) -> int:
        """Queues a request and returns its handle; `on_output` is called from the scheduler's thread and must not block.

        Raises:
            RequestError: INVALID_ARGUMENT for what can never be served, UNAVAILABLE over the queue's limit or while closing.
        """
        token_ids = [] if not len(prompt) else self._engine.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        resolved = sampling.resolve(self._engine.defaults)
        self._engine.scheduler.check(token_ids, resolved)
        with self._wake:
            if self._closing:
                raise RequestError("UNAVAILABLE", "server is shutting down; send the request to another one")
            waiting = sum(not entry.started for entry in self._entries.values())
            if waiting >= self._max_queued:
                raise RequestError(
                    "UNAVAILABLE", f"queue: got {waiting} waiting requests, at most {self._max_queued}; try again later"
                )
            handle = next(self._handles)
            self._entries[handle] = _Entry(
                prompt_ids=token_ids, sampling=resolved, on_output=on_output, queued_at=time.monotonic()
            )
            self._inbox.append(("add", handle))
            self._wake.notify()
        return handle

    def cancel(self, handle: int) -> None:
        """Ends a request with finish_reason "cancelled" within one step; nothing happens if it has ended."""
        with self._wake:
            self._inbox.append(("cancel", handle))
            self._wake.notify()

    def close(self, timeout_s: float = 5.0) -> None:
        """Refuses new requests, gives the others `timeout_s` to finish, fails the rest and stops the thread."""
        with self._wake:
            self._closing = True
            self._deadline = time.monotonic() + timeout_s
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        scheduler = self._engine.scheduler
        while True:
            with self._wake:
                while not self._inbox and scheduler.is_idle and not self._closing:
                    self._wake.wait()
                inbox, closing = list(self._inbox), self._closing
                self._inbox.clear()
            try:
                for action, handle in inbox:
                    self._apply(action, handle)
                self._expire()
                if closing and (scheduler.is_idle or time.monotonic() >= self._deadline):
                    scheduler.fail_all(RequestError("UNAVAILABLE", "server is shutting down; send the request to another one"))
                    return
                scheduler.tick()
            except Exception:
                # After an unexpected error no row can be trusted: all end, and the next ones start clean.
                _logger.exception("the scheduler failed; every request in flight ends with an error")
                self._fail_all(RequestError("INTERNAL", "internal error; see the server's log"))

    def _fail_all(self, error: RequestError) -> None:
        for handle, entry in list(self._entries.items()):
            if entry.job is None:
                self._on_output(handle, entry, error)
        self._engine.scheduler.fail_all(error)

    def _apply(self, action: str, handle: int) -> None:
        entry = self._entries.get(handle)
        if entry is None:
            return
        scheduler = self._engine.scheduler
        if action == "cancel":
            scheduler.cancel(entry.job)
        else:
            entry.job = scheduler.add(entry.prompt_ids, entry.sampling, lambda output: self._on_output(handle, entry, output))

    def _expire(self) -> None:
        """Fails what has waited too long to be admitted."""
        now = time.monotonic()
        for entry in list(self._entries.values()):
            if entry.job is None or entry.started:
                continue
            entry.started = entry.job.slot >= 0
            waited = now - entry.queued_at
            if not entry.started and waited > self._queue_timeout_s:
                self._engine.scheduler.fail(
                    entry.job,
                    RequestError(
                        "DEADLINE_EXCEEDED",
                        f"queue: waited {waited:.0f} s, at most {self._queue_timeout_s:g} s; try again later",
                    ),
                )

    def _on_output(self, handle: int, entry: _Entry, output: CanvasOutput | RequestError) -> None:
        if isinstance(output, RequestError) or output.finish_reason is not None:
            with self._wake:
                self._entries.pop(handle, None)
        try:
            entry.on_output(output)
        except Exception:
            _logger.exception("a request's on_output failed; the others go on")
