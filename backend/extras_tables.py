"""What the requests in all slots ask of a step beyond the plain one, as tables: `row_extras` for loops of compiled operators.

A table has a row for each slot. That of a slot without extras changes nothing.
"""

import torch
from torch import Tensor

from backend.job import TokenLogprob
from backend.logprobs import token_logprobs
from backend.parameters import MOST_ALTERNATIVES
from backend.sampling_config import ResolvedSampling
from plugins.vocabulary.tables import Bias, Filters, LogprobTables


class ExtrasTables:
    """All tensors live as long as the object, and are written in place."""

    def __init__(self, num_slots: int, canvas_length: int, vocab_size: int, device: torch.device):
        self._bias = torch.zeros(num_slots, vocab_size, dtype=torch.float32, device=device)
        self._biased = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.filters = Filters.off(num_slots, device)
        self.logprob_tables = LogprobTables.empty(num_slots, canvas_length, MOST_ALTERNATIVES, device)
        self._counts: dict[int, int] = {}  # of the slots that want log probabilities

    def start(self, slot: int, sampling: ResolvedSampling) -> None:
        """From now on the slot's are those of `sampling`."""
        if sampling.logit_bias:
            token_ids, values = zip(*sampling.logit_bias, strict=True)
            self._bias[slot] = 0
            self._bias[slot, list(token_ids)] = torch.tensor(values, device=self._bias.device)
        self._biased[slot] = bool(sampling.logit_bias)
        for table, value in zip(self.filters, (sampling.top_k, sampling.top_p, sampling.min_p), strict=True):
            table[slot] = value
        self._counts.pop(slot, None)
        if sampling.logprobs:
            self._counts[slot] = min(sampling.top_logprobs, self._bias.shape[1])
        self.logprob_tables.counts[slot] = self._counts.get(slot, -1)

    def bias(self, slots: Tensor) -> Bias:
        """Of rows that belong to `slots` [R]."""
        return Bias(self._bias, self._biased, slots)

    def logprobs(self, slot: int) -> list[TokenLogprob] | None:
        """Those of the last step, if the slot wants any."""
        if slot not in self._counts:
            return None
        _, logprobs, tokens, values = (table[slot] for table in self.logprob_tables)
        return token_logprobs(logprobs, tokens[:, : self._counts[slot]], values[:, : self._counts[slot]])
