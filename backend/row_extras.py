"""What one request asks of a step beyond the plain one: a penalty of repeated tokens, a logit bias, sampling filters, log
probabilities, and a choice of its canvas' first tokens."""

from collections.abc import Iterator

import numpy as np
import torch

from backend.logit_filters import filtered_sample
from backend.logprobs import CanvasLogprobs
from backend.opening import Opening
from backend.sampler import FORBIDDEN, LogitBias, Repetition, VocabularyPass
from backend.sampling_config import ResolvedSampling
from contract.model_config import ModelConfig


class RowExtras:
    """Of one canvas. `RowExtras.of` gives None for a request that asks for none."""

    def __init__(self, sampling: ResolvedSampling, model: ModelConfig, device: torch.device, opening: Opening | None):
        token_ids, values = zip(*sampling.logit_bias, strict=True) if sampling.logit_bias else ((), ())
        self._token_ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
        self._values = torch.tensor(values, dtype=torch.float32, device=device)
        self._repeated = torch.tensor(sampling.repeated, dtype=torch.int64, device=device)
        self._penalty = sampling.repetition_penalty
        forbidden = np.flatnonzero(~opening.allowed) if opening else []
        self._forbidden = torch.as_tensor(forbidden, dtype=torch.int64, device=device)  # as the canvas' first tokens
        self._num_first = opening.num_places if opening else 0
        self._filters = {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
        self._has_filters = _has_filters(sampling)
        num_alternatives = min(sampling.top_logprobs, model.vocab_size)
        self.logprobs = CanvasLogprobs(model.canvas_length, num_alternatives, device) if sampling.logprobs else None

    @classmethod
    def of(
        cls, sampling: ResolvedSampling, model: ModelConfig, device: torch.device, opening: Opening | None
    ) -> "RowExtras | None":
        """opening: see `CanvasLoop.start_canvas`."""
        if sampling.logit_bias or sampling.repeated or sampling.logprobs or _has_filters(sampling) or opening:
            return cls(sampling, model, device, opening)
        return None

    def repetition(self, rows: slice) -> Repetition:
        """For `rows` of a chunk."""
        return Repetition(rows.start, rows.stop, self._repeated, self._penalty)

    def biases(self, rows: slice, positions: slice) -> Iterator[LogitBias]:
        """For `rows` of a chunk, which are at `positions` of this canvas."""
        yield LogitBias(rows.start, rows.stop, self._token_ids, self._values)
        num_first = min(positions.stop, self._num_first) - positions.start
        if num_first > 0:
            values = torch.full(self._forbidden.shape, FORBIDDEN, device=self._forbidden.device)
            yield LogitBias(rows.start, rows.start + num_first, self._forbidden, values)

    def after(self, result: VocabularyPass, noise: torch.Tensor | None, rows: slice, positions: slice) -> None:
        """Draws `result.sampled` of `rows` again if there are filters, and records their log probabilities.

        noise: the chunk's, None where all its rows are greedy (their requests have no filters). positions: where in the canvas
        `rows` are.
        """
        if self._has_filters:
            result.sampled[rows] = filtered_sample(result.processed[rows], noise[rows], **self._filters)
        if self.logprobs:
            self.logprobs.record(positions, result.processed[rows], result.argmax[rows], result.logprob[rows])


def _has_filters(sampling: ResolvedSampling) -> bool:
    return bool(sampling.top_k) or sampling.top_p < 1 or sampling.min_p > 0
