"""The canvas loop on a GPU: a denoising step is captured as CUDA graphs, once for each batch size, and then replayed.

A bucket is a batch size that is captured; a batch is filled up to the next bucket with idle rows, which have a state row of
their own. Nothing in a step depends on the host but the rows and their prefix lengths, which are copied in. Two graphs a step:

    1. state of the rows → denoise → head and vocabulary pass, chunk by chunk → acceptance → state, results to the host
    2. soft embeddings of the last chunk → state

The host waits for the first only: while the second runs it reads the results and prepares the next step. The definitions are
those of `canvas_loop`, the arithmetic is that of `plugins.vocabulary`. On CPU tensors, in Triton's interpreter, a step runs
uncaptured.

What requests ask for beyond the plain step is in tables that the same kernels read (`extras_tables`): every row is in the same
step, whatever it asks for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from backend import sampler
from backend.graphs import Graphs
from backend.kv_cache import PagedKVCache
from backend.opening import Opening
from backend.sampling_config import ResolvedSampling
from backend.session import Session
from backend.table_loop import TableLoop
from plugins.vocabulary.feedback import soft_embeddings
from plugins.vocabulary.filters import filter_samples
from plugins.vocabulary.launch import accept_and_renoise, vocabulary_pass
from plugins.vocabulary.logprobs import record_logprobs


@dataclass(frozen=True, kw_only=True)
class _Results:
    """What the host reads of a step, in memory that copies from the device do not wait for. One entry a row of the bucket."""

    finished: Tensor  # [B] bool
    argmax: Tensor  # [B, C] int64
    steps: Tensor  # [B] int64


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the graphs of one bucket are given."""

    staged: Tensor  # on the host, what goes to `on_device`
    on_device: Tensor  # [2, B] int64: rows of the state, prefix lengths


@dataclass(frozen=True, kw_only=True)
class _Step:
    """A step of one bucket, ready to run: fill `inputs`, run `first`, then `second`; `results` are there after `first`."""

    inputs: _Inputs
    results: _Results
    first: Callable[[], object]
    second: Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Rows that the head and the vocabulary pass are over with; their logits are there until they are fed back."""

    rows: slice
    logits: Tensor
    argmax: Tensor
    processing: Mapping[str, object]  # what makes the processed logits of them: cap, temperature, bias


def buckets(max_sequences: int) -> tuple[int, ...]:
    """1, 2, 4, … and at last max_sequences."""
    sizes = [1]
    while sizes[-1] < max_sequences:
        sizes.append(min(2 * sizes[-1], max_sequences))
    return tuple(sizes)


class CapturedLoop(TableLoop):
    """As `CanvasLoop`. Every tensor that a graph reads or writes lives as long as the loop."""

    def __init__(
        self,
        session: Session,
        cache: PagedKVCache,
        *,
        workspace_bytes: int = 512 << 20,
        max_step_sequences: int | None = None,
        capture: bool = True,
    ):
        """`workspace_bytes` bounds the logits of a chunk, the one thing of the vocabulary's size. `max_step_sequences`: the
        most that one step is given; None: all. Without `capture`, as on the CPU, the same operations run one by one."""
        super().__init__(session, cache, workspace_bytes=workspace_bytes)
        if self.head_rows > self._model.canvas_length:  # whole canvases, so that each is in its own product of `feed_back`
            self.head_rows -= self.head_rows % self._model.canvas_length
        self.batches = buckets(max_step_sequences or len(cache.length))
        """The buckets."""
        self._idle = len(cache.length)
        self._steps: dict[int, _Step] = {}
        self._results: dict[int, tuple[_Results, int]] = {}  # slot → where the host has its last results
        self._on_gpu = session.device.type == "cuda"
        self._graphs = Graphs() if capture and self._on_gpu else None
        if self._on_gpu:
            self._first_done = torch.cuda.Event()
            self._other_stream = torch.cuda.Stream(session.device)
        # The idle row computes like any other: its temperature must be a number, and without noise it costs least.
        self._t_min[self._idle] = self._t_max[self._idle] = 1.0
        self._num_steps[self._idle] = 1
        self._greedy[self._idle] = True

    def step(self, slots: Sequence[int]) -> list[bool]:
        """See `CanvasLoop.step`. Waits for the device until the results are there, not until the step is over."""
        size = self._bucket(slots)
        step = self._steps.get(size) or self._prepare(size)
        self._fill(step.inputs, slots)
        step.first()
        if self._on_gpu:
            self._first_done.record()
        step.second()
        if self._on_gpu:
            self._first_done.synchronize()
        self._results = {slot: (step.results, row) for row, slot in enumerate(slots)}
        return step.results.finished[: len(slots)].tolist()

    def start_canvas(self, slot: int, canvas_index: int, sampling: ResolvedSampling, opening: Opening | None = None) -> None:
        """See `CanvasLoop.start_canvas`."""
        self._results.pop(slot, None)
        super().start_canvas(slot, canvas_index, sampling, opening)

    def argmax_canvas(self, slot: int) -> list[int]:
        """See `CanvasLoop.argmax_canvas`. Does not wait for the device."""
        if slot not in self._results:
            return super().argmax_canvas(slot)
        results, row = self._results[slot]
        return results.argmax[row].tolist()

    def num_steps(self, slot: int) -> int:
        """See `CanvasLoop.num_steps`. Does not wait for the device."""
        if slot not in self._results:
            return super().num_steps(slot)
        results, row = self._results[slot]
        return int(results.steps[row])

    def prepare(self) -> None:
        """See `CanvasLoop.prepare`: captures every bucket. The largest goes first: the others find room in its memory."""
        for size in tqdm(self.batches[::-1], desc="capturing steps", disable=None):
            if size not in self._steps:
                self._prepare(size)

    def rehearse(self) -> None:
        """Runs a step of every bucket on the idle row, without capturing it."""
        for size in self.batches[::-1]:
            for part in self._parts(size)[2]:
                part()

    def _bucket(self, slots: Sequence[int]) -> int:
        return next(size for size in self.batches if size >= len(slots))

    def _fill(self, inputs: _Inputs, slots: Sequence[int]) -> None:
        """The last copy from `staged` must be over: what was made of it has been waited for."""
        padding = [self._idle] * (inputs.staged.shape[1] - len(slots))
        self._cache.upload_tables()
        lengths = [self._cache.length[slot] for slot in slots] + [0] * len(padding)
        inputs.staged.copy_(torch.tensor([[*slots, *padding], lengths]))
        inputs.on_device.copy_(inputs.staged, non_blocking=True)

    def _idle_inputs(self, size: int) -> _Inputs:
        staged = torch.zeros(2, size, dtype=torch.int64, pin_memory=self._on_gpu)
        staged[0] = self._idle
        return _Inputs(staged=staged, on_device=staged.to(self._session.device, copy=True))

    def _prepare(self, size: int) -> _Step:
        inputs, results, parts = self._parts(size)
        first, second = self._ready(*parts)
        self._steps[size] = _Step(inputs=inputs, results=results, first=first, second=second)
        return self._steps[size]

    def _parts(self, size: int) -> tuple[_Inputs, _Results, Sequence[Callable[[], object]]]:
        """The two parts of a bucket's step, what they are given and what they fill."""
        pinned, inputs = {"pin_memory": self._on_gpu}, self._idle_inputs(size)
        results = _Results(
            finished=torch.zeros(size, dtype=torch.bool, **pinned),
            argmax=torch.zeros(size, self._model.canvas_length, dtype=torch.int64, **pinned),
            steps=torch.zeros(size, dtype=torch.int64, **pinned),
        )
        pending: list[Callable[[], None]] = []
        parts = (lambda: pending.append(self._update_canvases(inputs.on_device, results)), lambda: pending.pop()())
        return inputs, results, parts

    def _ready(self, *parts: Callable[[], object]) -> Sequence[Callable[[], object]]:
        """As graphs, or as they are where nothing is captured."""
        return self._graphs.captured(*parts) if self._graphs else parts

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Of a GPU another stream, a branch where a step is captured. What is made there may be used after `_join`."""
        if not self._on_gpu:
            yield
            return
        self._other_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._other_stream):
            yield

    def _join(self) -> None:
        if self._on_gpu:
            torch.cuda.current_stream().wait_stream(self._other_stream)

    def _hidden_of(self, inputs: Tensor) -> Tensor:
        rows, prefix_lengths = inputs[0], inputs[1].int()
        tables = {kind: table.index_select(0, rows) for kind, table in self._cache.device_tables.items()}
        return self._hidden(rows, prefix_lengths, tables)

    @torch.no_grad()
    def _update_canvases(self, inputs: Tensor, results: _Results) -> Callable[[], None]:
        """The first part of a step; returns its second part. The numbers are those of `canvas_loop`."""
        rows, length = inputs[0], self._model.canvas_length
        # 1. Beside it goes what 2. needs to know of the rows: many kernels, all of them tiny.
        with self._beside():
            seed, canvas_index, step = self._seed[rows], self._canvas_index[rows], self._step[rows]
            num_steps = self._num_steps[rows]
            each = {
                "temperature": sampler.temperature_schedule(self._t_min[rows], self._t_max[rows], num_steps - step, num_steps),
                "slots": rows,
                "greedy": self._greedy[rows],
                "seeds": seed,
                "canvas_indices": canvas_index,
                "steps": step,
            }
            each = {name: value.repeat_interleave(length) for name, value in each.items()}
            each["positions"] = self._within.repeat(rows.numel())
            each["slots"] = self._tables.slots(each["slots"], each["positions"])
            given = self._given[rows]
        hidden = self._hidden_of(inputs).flatten(0, 1)
        # 2.
        self._join()
        passes, soft_embeds = [], torch.empty_like(hidden)

        def pass_over(chunk: slice) -> _Chunk:
            logits = self._session.head(hidden[chunk])
            drawn = {name: each[name][chunk] for name in ("seeds", "canvas_indices", "steps", "positions")}
            processing = {
                "cap": self._model.final_logit_softcapping,
                "temperature": each["temperature"][chunk],
                "adjustment": self._tables.adjustment(each["slots"][chunk]),
            }
            result = vocabulary_pass(logits, greedy=each["greedy"][chunk], **processing, **drawn)
            likeliest = {"argmax": result.argmax, **processing}
            filter_samples(logits, result.sampled, self._tables.filters, **likeliest, **drawn)
            positions, tables = drawn["positions"], self._tables.logprob_tables
            record_logprobs(logits, tables, logprob=result.logprob, positions=positions, **likeliest)
            passes.append((result.argmax, result.sampled, result.entropy))
            return _Chunk(rows=chunk, logits=logits, argmax=result.argmax, processing=processing)

        def feed_back(chunk: _Chunk) -> None:  # 5.
            soft_embeds[chunk.rows] = soft_embeddings(
                chunk.logits,
                argmax=chunk.argmax,
                embedding=self._session.embedding,
                embed_scale=self._embed_scale,
                given=given.flatten()[chunk.rows],
                rows_at_once=length,
                **chunk.processing,
            )

        held = None  # the last chunk: its logits are gone before the next are there
        for begin in range(0, hidden.shape[0], self.head_rows):
            if held:
                feed_back(held)
                held = None
            held = pass_over(slice(begin, begin + self.head_rows))
        passed = (torch.cat(parts).view(-1, length) for parts in zip(*passes, strict=True))
        argmax, sampled, entropy = sampler.put_given(given, *passed)
        # 3. and 4.
        accepted = accept_and_renoise(
            entropy=entropy,
            argmax=argmax,
            sampled=sampled,
            bound=self._entropy_bound[rows],
            confidence_threshold=self._confidence[rows],
            previous_argmax=self._argmax[rows],
            stable_steps=self._stable_steps[rows],
            stability_threshold=self._stability[rows],
            seeds=seed,
            canvas_indices=canvas_index,
            steps=step,
            vocab_size=self._model.vocab_size,
        )
        finished = accepted.converged | (step + 1 >= num_steps)
        for state, value in (
            (self._canvas, accepted.canvas),
            (self._argmax, argmax),
            (self._stable_steps, accepted.stable_steps),
            (self._step, step + 1),
        ):
            state.index_copy_(0, rows, value)
        results.finished.copy_(finished, non_blocking=True)
        results.argmax.copy_(argmax, non_blocking=True)
        results.steps.copy_(step + 1, non_blocking=True)

        @torch.no_grad()
        def last() -> None:
            feed_back(held)
            self._soft_embeds.index_copy_(0, rows, soft_embeds.view(rows.numel(), length, -1))

        return last
