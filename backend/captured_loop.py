"""The canvas loop on a GPU: a denoising step is captured as CUDA graphs, once for each batch size, and then replayed.

A bucket is a batch size that is captured; a batch is filled up to the next bucket with idle rows, which have a state row of
their own. Nothing in a step depends on the host but the rows and their prefix lengths, which are copied in. Two graphs a step:

    1. state of the rows → denoise → head and vocabulary pass, chunk by chunk → acceptance → state, results to the host
    2. soft embeddings of the last chunk → state

The host waits for the first only: while the second runs it reads the results and prepares the next step. New tokens of a
sequence, a commit or a short prompt, may go with a step: each bucket has graphs for that too (`Session.mixed`). The definitions
are those of `canvas_loop`, the arithmetic is that of `plugins.vocabulary`. On CPU tensors, in Triton's interpreter, a step runs
uncaptured.

What requests ask for beyond the plain step is in tables that the same kernels read (`extras_tables`): every row is in the same
step, whatever it asks for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from backend import sampler
from backend.canvas_loop import CanvasState, states_after
from backend.captured_step import Inputs, NewInputs, Results, Step, buckets
from backend.encode_pass import NewTokens
from backend.graphs import Graphs
from backend.kv_cache import PagedKVCache
from backend.opening import Opening
from backend.sampling_config import ResolvedSampling
from backend.session import Session
from backend.table_loop import TableLoop
from contract.model_config import LayerType
from plugins.vocabulary.feedback import soft_embeddings
from plugins.vocabulary.filters import filter_samples
from plugins.vocabulary.launch import accept_and_renoise, vocabulary_pass
from plugins.vocabulary.logprobs import record_logprobs


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Rows that the head and the vocabulary pass are over with; their logits are there until they are fed back."""

    rows: slice
    logits: Tensor
    argmax: Tensor
    processing: Mapping[str, object]  # what makes the processed logits of them: cap, temperature, bias


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
        self.can_mix = session.can_mix
        self._steps: dict[tuple[int, bool], Step] = {}  # by bucket, and whether new tokens go with it
        self._results: dict[int, tuple[Results, int]] = {}  # slot → where the host has its last results
        self._on_gpu = session.device.type == "cuda"
        self._graphs = Graphs(session.manifest.build.expert_gpus) if capture and self._on_gpu else None
        if self._on_gpu:
            self._first_done = torch.cuda.Event()
            self._other_stream = torch.cuda.Stream(session.device)
        # The idle row computes like any other: its temperature must be a number, and without noise it costs least.
        self._t_min[self._idle] = self._t_max[self._idle] = 1.0
        self._num_steps[self._idle] = 1
        self._greedy[self._idle] = True

    def step(self, slots: Sequence[int], new_tokens: NewTokens | None = None) -> list[CanvasState]:
        """See `CanvasLoop.step`. Waits for the device until the results are there, not until the step is over."""
        key = self._bucket(slots), new_tokens is not None
        step = self._steps.get(key) or self._prepare(*key)
        with self._filled(step.new, new_tokens):
            self._fill(step.inputs, slots)
            step.first()
            if self._on_gpu:
                self._first_done.record()
            step.second()
            if self._on_gpu:
                self._first_done.synchronize()
        self._results = {slot: (step.results, row) for row, slot in enumerate(slots)}
        return [CanvasState(each) for each in step.results.states[: len(slots)].tolist()]

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
        for key in tqdm(self._kinds(), desc="capturing steps", disable=None):
            if key not in self._steps:
                self._prepare(*key)

    def rehearse(self) -> None:
        """Runs a step of every bucket on the idle row, without capturing it."""
        for key in self._kinds():
            step = self._uncaptured(*key)
            step.first()
            step.second()

    def _kinds(self) -> list[tuple[int, bool]]:
        """Of the steps that there are, the largest first."""
        return [(size, mixed) for size in self.batches[::-1] for mixed in ((True, False) if self.can_mix else (False,))]

    def _bucket(self, slots: Sequence[int]) -> int:
        return next(size for size in self.batches if size >= len(slots))

    def _fill(self, inputs: Inputs, slots: Sequence[int]) -> None:
        """The last copy from `staged` must be over: what was made of it has been waited for."""
        padding = [self._idle] * (inputs.staged.shape[1] - len(slots))
        self._cache.upload_tables()
        lengths = [self._cache.length[slot] for slot in slots] + [0] * len(padding)
        inputs.staged.copy_(torch.tensor([[*slots, *padding], lengths]))
        inputs.on_device.copy_(inputs.staged, non_blocking=True)

    @contextmanager
    def _filled(self, inputs: NewInputs | None, new_tokens: NewTokens | None) -> Iterator[None]:
        """Around a step with new tokens: their sequence has them from the beginning."""
        if inputs is None:
            yield
            return
        slot, count = new_tokens.slot, len(new_tokens.token_ids)
        length, keys = self._cache.length[slot], new_tokens.page_keys
        with self._cache.appending([slot], [count], page_keys=[keys] if keys else None) as places:
            inputs.fill(slot, length, new_tokens.token_ids, places)
            yield

    def _prepare(self, size: int, mixed: bool) -> Step:
        step = self._uncaptured(size, mixed)
        if self._graphs:
            first, second = self._graphs.captured(step.first, step.second)
            step = replace(step, first=first, second=second)
        self._steps[size, mixed] = step
        return step

    def _uncaptured(self, size: int, mixed: bool) -> Step:
        """A step of the idle row, whose operations run one by one. mixed: with new tokens."""
        length, device = self._model.canvas_length, self._session.device
        inputs, results = Inputs.of(size, self._idle, device), Results.of(size, length, pinned=self._on_gpu)
        new = NewInputs.of(tuple(self._cache.device_tables), length, self._idle, device) if mixed else None
        pending: list[Callable[[], None]] = []
        hidden = partial(self._hidden_of, inputs.on_device, new)
        return Step(
            inputs=inputs,
            new=new,
            results=results,
            first=lambda: pending.append(self._update_canvases(inputs.on_device, hidden, results)),
            second=lambda: pending.pop()(),
        )

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

    def _hidden_of(self, inputs: Tensor, new: NewInputs | None) -> Tensor:
        rows, denoise = inputs[0], self._session.denoise
        if new:
            denoise = partial(self._session.mixed, table=self._tables_of(new.slot), **new.tensors())
        return self._hidden(denoise, rows, inputs[1].int(), self._tables_of(rows))

    def _tables_of(self, rows: Tensor) -> dict[LayerType, Tensor]:
        return {kind: table.index_select(0, rows) for kind, table in self._cache.device_tables.items()}

    @torch.no_grad()
    def _update_canvases(self, inputs: Tensor, hidden_states: Callable[[], Tensor], results: Results) -> Callable[[], None]:
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
        hidden = hidden_states().flatten(0, 1)
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
        states = states_after(accepted.converged | (step + 1 >= num_steps), entropy)
        for state, value in (
            (self._canvas, accepted.canvas),
            (self._argmax, argmax),
            (self._stable_steps, accepted.stable_steps),
            (self._step, step + 1),
        ):
            state.index_copy_(0, rows, value)
        results.states.copy_(states, non_blocking=True)
        results.argmax.copy_(argmax, non_blocking=True)
        results.steps.copy_(step + 1, non_blocking=True)

        @torch.no_grad()
        def last() -> None:
            feed_back(held)
            self._soft_embeds.index_copy_(0, rows, soft_embeds.view(rows.numel(), length, -1))

        return last
