"""The canvas loop's step: every active row's canvas goes through one denoise, head and sampler update.

One denoising step of a row, numbered as in transformers' `generate` (1.c.i to 1.c.v):

1. denoise and head: raw logits of the canvas, given the prefix and the previous step's soft embeddings.
2. Processed logits (soft-cap, temperature), argmax canvas, denoiser canvas.
3. Accept by the entropy bound, renoise the rest.
4. Converged? Then the row is done: its argmax canvas is the result.
5. Soft embeddings of the processed logits, for the next step.

A request may ask for more: a logit bias (in 2, before the temperature), filters (of the denoiser canvas in 2), log
probabilities, tokens of the answer that are given (put in after 2 and 5), and a choice of the canvas' first token (a bias).

Rows are independent: each has its own step, temperature, bound, seed and limits, and joins and leaves between any two steps.
The state of a row is a few tensors of canvas size; logits live only inside a chunk of rows of the head.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum

import torch

from backend import sampler
from backend.encode_pass import NewTokens
from backend.infill import BLANK, given_tokens
from backend.job import TokenLogprob
from backend.kv_cache import PagedKVCache
from backend.noise import gumbel_noise_rows, initial_canvas_rows, renoise_tokens_rows, seed_bits
from backend.opening import Opening
from backend.pass_memory import head_row_bytes
from backend.row_extras import RowExtras
from backend.sampling_config import ResolvedSampling
from backend.session import Session
from contract.model_config import LayerType


class CanvasState(IntEnum):
    """Of a canvas after a step. NOT_FINITE: the entropy of a position is no number, as its logits are none; nothing can come of
    it."""

    DENOISING = 0
    FINISHED = 1
    NOT_FINITE = 2


def states_after(finished: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """`CanvasState` of canvases, [B] int8. finished: [B] bool, whether they would be; entropy: [B, C] float32, of the step."""
    return finished.to(torch.int8).masked_fill(~entropy.isfinite().all(dim=-1), CanvasState.NOT_FINITE)


class CanvasLoop:
    """The canvases of all slots of a KV cache. One owner, one thread."""

    _plain = True  # what the head's rows take: see `head_row_bytes`

    def __init__(self, session: Session, cache: PagedKVCache, *, workspace_bytes: int = 512 << 20):
        """`workspace_bytes` bounds the memory of the head and the sampler, however many rows there are."""
        model, build, device = session.manifest.model, session.manifest.build, session.device
        num_slots = len(cache.length) + 1  # one more, the idle row that fills up a batch of fixed size
        self._session, self._cache, self._model = session, cache, model
        fitting = workspace_bytes // head_row_bytes(model, build, plain=self._plain)
        self.head_rows = max(1, min(fitting, build.max_head_rows))
        """The most rows that the head gets at once."""
        self._embed_scale = model.hidden_size**0.5

        def state(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(num_slots, *shape, dtype=dtype, device=device)

        length = model.canvas_length
        self._within = torch.arange(length, device=device)
        self._canvas = state(torch.int64, length)
        self._argmax = state(torch.int64, length)
        self._given = state(torch.int64, length).fill_(BLANK)
        self._soft_embeds = state(session.dtype, length, model.hidden_size)
        self._stable_steps = state(torch.int64)
        self._step = state(torch.int64)
        self._canvas_index = state(torch.int64)
        self._seed = state(torch.int64)
        self._num_steps = state(torch.int64)
        self._t_min, self._t_max = state(torch.float64), state(torch.float64)
        self._entropy_bound, self._confidence = state(torch.float32), state(torch.float32)
        self._stability = state(torch.int64)
        self._greedy = state(torch.bool)
        self._extras: dict[int, RowExtras] = {}  # of the slots that have any

    def prepare(self) -> None:
        """Makes ready, before anyone waits for it, what steps need. The session must have its pages."""

    def start_canvas(self, slot: int, canvas_index: int, sampling: ResolvedSampling, opening: Opening | None = None) -> None:
        """Fills the slot's canvas with its initial noise; the prefix must be in the cache. opening: what it may begin with;
        None: with everything."""
        self._seed[slot] = seed_bits(sampling.seed)
        self._canvas_index[slot] = canvas_index
        noise = initial_canvas_rows(
            self._seed[slot : slot + 1], self._canvas_index[slot : slot + 1], self._within, self._model.vocab_size
        )
        given = torch.tensor(given_tokens(sampling.infill, canvas_index, self._model.canvas_length), device=noise.device)
        self._given[slot] = given
        self._canvas[slot] = given.where(given != BLANK, noise)
        self._argmax[slot] = sampler.NO_CANVAS
        self._soft_embeds[slot] = 0
        self._stable_steps[slot] = 0
        self._step[slot] = 0
        self._num_steps[slot] = sampling.max_denoising_steps
        self._t_min[slot], self._t_max[slot] = sampling.t_min, sampling.t_max
        self._entropy_bound[slot] = sampling.entropy_bound
        self._confidence[slot] = sampling.confidence_threshold
        self._stability[slot] = sampling.stability_threshold
        self._greedy[slot] = sampling.greedy
        self._start_extras(slot, sampling, opening)

    def _start_extras(self, slot: int, sampling: ResolvedSampling, opening: Opening | None) -> None:
        self._extras.pop(slot, None)
        extras = RowExtras.of(sampling, self._model, self._session.device, opening)
        if extras:
            self._extras[slot] = extras

    def argmax_canvas(self, slot: int) -> list[int]:
        """The most likely tokens at the row's last step: what is committed and returned."""
        return self._argmax[slot].tolist()

    def num_steps(self, slot: int) -> int:
        """Denoising steps that the row's canvas has taken."""
        return int(self._step[slot])

    def logprobs(self, slot: int) -> list[TokenLogprob] | None:
        """Those of `argmax_canvas`, if the request asks for them."""
        extras = self._extras.get(slot)
        return extras.logprobs.tolist() if extras and extras.logprobs else None

    can_mix = False
    """Whether `step` takes new tokens, as many as a canvas has at most, without images."""

    def step(self, slots: Sequence[int], new_tokens: NewTokens | None = None) -> list[CanvasState]:
        """One denoising step of each of `slots`; returns how their canvases are after it. new_tokens: encoded in the same pass,
        before a canvas of their sequence sees them."""
        rows = torch.tensor(slots, device=self._session.device)
        # 1.
        hidden = self._denoise(slots, rows)
        # 2. and 5.
        argmax, sampled, entropy = self._vocabulary(slots, rows, hidden)
        given = self._given[rows]
        if (given != BLANK).any():
            argmax, sampled, entropy = sampler.put_given(given, argmax, sampled, entropy)
            soft = self._soft_embeds[rows]
            self._soft_embeds[rows] = sampler.put_given_embeddings(given, soft, self._session.embedding, self._embed_scale)
        # 3. and 4.
        canvas, stable_steps, converged = self._advance(rows, argmax, sampled, entropy)
        self._canvas[rows] = canvas
        self._argmax[rows] = argmax
        self._stable_steps[rows] = stable_steps
        self._step[rows] += 1
        finished = converged | (self._step[rows] >= self._num_steps[rows])
        return [CanvasState(each) for each in states_after(finished, entropy).tolist()]

    def _denoise(self, slots: Sequence[int], rows: torch.Tensor) -> torch.Tensor:
        """Hidden states of the rows' canvases [B, C, D]."""
        lengths = torch.tensor([self._cache.length[slot] for slot in slots], dtype=torch.int32, device=rows.device)
        return self._hidden(self._session.denoise, rows, lengths, self._cache.tables(slots))

    def _hidden(
        self,
        denoise: Callable[..., torch.Tensor],
        rows: torch.Tensor,
        prefix_lengths: torch.Tensor,
        tables: Mapping[LayerType, torch.Tensor],
    ) -> torch.Tensor:
        """One pass of `denoise` over the rows' canvases, given their prefixes' lengths and page tables: [B, C, D]."""
        return denoise(self._canvas[rows].int(), self._soft_embeds[rows], prefix_lengths, tables)

    def _advance(
        self, rows: torch.Tensor, argmax: torch.Tensor, sampled: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows' next canvas [B, C], their stable steps [B] and whether they have converged [B]."""
        mask = sampler.accept(entropy, self._entropy_bound[rows])
        seed, index, step = self._seed[rows, None], self._canvas_index[rows, None], self._step[rows, None]
        renoise = renoise_tokens_rows(seed, index, step, self._within, self._model.vocab_size)
        convergence = sampler.converged(
            argmax,
            entropy,
            previous_argmax_canvas=self._argmax[rows],
            stable_steps=self._stable_steps[rows],
            stability_threshold=self._stability[rows],
            confidence_threshold=self._confidence[rows],
        )
        return sampler.next_canvas(mask, sampled, renoise), convergence.stable_steps, convergence.converged

    def _vocabulary(
        self, slots: Sequence[int], rows: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Head and vocabulary pass, chunk by chunk: argmax, sampled and entropy, each [B, C]; writes the soft embeddings."""
        batch, length = hidden.shape[:2]
        hidden = hidden.flatten(0, 1)
        steps = self._step[rows]
        temperature = sampler.temperature_schedule(
            self._t_min[rows], self._t_max[rows], self._num_steps[rows] - steps, self._num_steps[rows]
        )
        slot = rows.repeat_interleave(length)
        position = self._within.repeat(batch)
        temperature = temperature.repeat_interleave(length)
        greedy = self._greedy[slot]
        all_greedy = bool(greedy.all())
        argmax, sampled = torch.empty_like(slot), torch.empty_like(slot)
        entropy = torch.empty(slot.shape, dtype=torch.float32, device=slot.device)
        soft_embeds = torch.empty_like(hidden)
        for chunk in self._chunks(slot.numel()):
            each = slot[chunk]
            extras = list(self._extras_within(slots, chunk))
            noise = None
            if not all_greedy:
                drawn = (self._seed[each], self._canvas_index[each], self._step[each], position[chunk])
                noise = gumbel_noise_rows(*drawn, self._model.vocab_size)
            result = sampler.vocabulary_pass(
                self._session.head(hidden[chunk]),
                cap=self._model.final_logit_softcapping,
                temperature=temperature[chunk],
                noise=noise,
                repetitions=[extra.repetition(of_chunk) for extra, of_chunk, _ in extras],
                bias=[each for extra, *of_it in extras for each in extra.biases(*of_it)],
            )
            for extra, of_chunk, of_canvas in extras:
                extra.after(result, noise, of_chunk, of_canvas)
            argmax[chunk], entropy[chunk] = result.argmax, result.entropy
            sampled[chunk] = torch.where(greedy[chunk], result.argmax, result.sampled)
            soft_embeds[chunk] = sampler.soft_embeddings(
                result.processed, self._session.embedding, self._embed_scale, self._session.dtype
            )
        self._soft_embeds[rows] = soft_embeds.view(batch, length, -1)
        return argmax.view(batch, length), sampled.view(batch, length), entropy.view(batch, length)

    def _chunks(self, num_rows: int) -> Iterator[slice]:
        """As few as the workspace allows, of about the same size: the CPU rounds products of a few rows differently, so a rest
        of them would not be what the same rows are in another batch."""
        count = -(-num_rows // self.head_rows)
        for index in range(count):
            yield slice(num_rows * index // count, num_rows * (index + 1) // count)

    def _extras_within(self, slots: Sequence[int], chunk: slice) -> Iterator[tuple[RowExtras, slice, slice]]:
        """Of each canvas with extras that has rows in the chunk: these rows of the chunk, and their positions in the canvas."""
        length = self._model.canvas_length
        for index, slot in enumerate(slots):
            first, end = max(index * length, chunk.start), min((index + 1) * length, chunk.stop)
            if first < end and slot in self._extras:
                of_chunk = slice(first - chunk.start, end - chunk.start)
                yield self._extras[slot], of_chunk, slice(first - index * length, end - index * length)
