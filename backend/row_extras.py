"""What one request asks of a step beyond the plain one: a logit bias, sampling filters, log probabilities."""

import torch

from backend.logit_filters import filtered_sample
from backend.logprobs import CanvasLogprobs
from backend.sampler import LogitBias, VocabularyPass
from backend.sampling_config import ResolvedSampling


class RowExtras:
    """Of one canvas. `RowExtras.of` gives None for a request that asks for none."""

    def __init__(self, sampling: ResolvedSampling, canvas_length: int, vocab_size: int, device: torch.device):
        token_ids, values = zip(*sampling.logit_bias, strict=True) if sampling.logit_bias else ((), ())
        self._token_ids = torch.tensor(token_ids, dtype=torch.int64, device=device)
        self._values = torch.tensor(values, dtype=torch.float32, device=device)
        self._filters = {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
        self._has_filters = _has_filters(sampling)
        num_alternatives = min(sampling.top_logprobs, vocab_size)
        self.logprobs = CanvasLogprobs(canvas_length, num_alternatives, device) if sampling.logprobs else None

    @classmethod
    def of(cls, sampling: ResolvedSampling, canvas_length: int, vocab_size: int, device: torch.device) -> "RowExtras | None":
        if sampling.logit_bias or sampling.logprobs or _has_filters(sampling):
            return cls(sampling, canvas_length, vocab_size, device)
        return None

    def bias(self, rows: slice) -> LogitBias:
        """For `rows` of a chunk, all of this canvas."""
        return LogitBias(rows.start, rows.stop, self._token_ids, self._values)

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
