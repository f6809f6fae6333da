"""What the requests in all slots ask of a step beyond the plain one, as tables: `row_extras` for loops of compiled operators.

A table has a row for each slot. That of a slot without extras changes nothing. The first tokens of a canvas have a row of their
own where they may not be every token: what an operator takes for their slot is then `num_slots` more (`slots`).
"""

import numpy as np
import torch
from torch import Tensor

from backend.job import TokenLogprob
from backend.logprobs import token_logprobs
from backend.opening import Opening
from backend.parameters import MOST_ALTERNATIVES
from backend.sampler import FORBIDDEN
from backend.sampling_config import ResolvedSampling
from plugins.vocabulary.tables import Adjustment, Filters, LogprobTables, num_words, token_words


class ExtrasTables:
    """All tensors live as long as the object, and are written in place."""

    def __init__(self, num_slots: int, canvas_length: int, vocab_size: int, device: torch.device):
        self._num_slots, num_rows = num_slots, 2 * num_slots
        self._bias = torch.zeros(num_rows, vocab_size, dtype=torch.float32, device=device)
        self._biased = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._repeated = torch.zeros(num_rows, num_words(vocab_size), dtype=torch.int32, device=device)
        self._penalties = torch.ones(num_rows, dtype=torch.float32, device=device)
        self._num_first = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.filters = Filters.off(num_rows, device)
        self.logprob_tables = LogprobTables.empty(num_rows, canvas_length, MOST_ALTERNATIVES, device)
        self._counts: dict[int, int] = {}  # of the slots that want log probabilities

    def start(self, slot: int, sampling: ResolvedSampling, opening: Opening | None = None) -> None:
        """From now on the slot's are those of `sampling`. opening: see `CanvasLoop.start_canvas`."""
        first = slot + self._num_slots
        self._num_first[slot] = opening.num_places if opening else 0
        if sampling.repeated:
            self._repeated[[slot, first]] = token_words(sampling.repeated, self._bias.shape[1], self._bias.device)
        for row in (slot, first) if opening else (slot,):
            if sampling.logit_bias:
                token_ids, values = zip(*sampling.logit_bias, strict=True)
                self._bias[row] = 0
                self._bias[row, list(token_ids)] = torch.tensor(values, device=self._bias.device)
            self._biased[row] = bool(sampling.logit_bias)
            self._penalties[row] = sampling.repetition_penalty if sampling.repeated else 1
            for table, value in zip(self.filters, (sampling.top_k, sampling.top_p, sampling.min_p), strict=True):
                table[row] = value
        if opening:
            bias = self._bias[first] if sampling.logit_bias else 0.0
            forbidden = torch.from_numpy(np.where(opening.allowed, np.float32(0), np.float32(FORBIDDEN)))
            self._bias[first] = forbidden.to(self._bias.device) + bias
            self._biased[first] = True
        self._counts.pop(slot, None)
        if sampling.logprobs:
            self._counts[slot] = min(sampling.top_logprobs, self._bias.shape[1])
        self.logprob_tables.counts[[slot, first]] = self._counts.get(slot, -1)

    def slots(self, slots: Tensor, positions: Tensor) -> Tensor:
        """The rows of the tables of canvas positions [R] that belong to `slots` [R]."""
        return slots + self._num_slots * (positions < self._num_first[slots])

    def adjustment(self, slots: Tensor) -> Adjustment:
        """slots: see `slots`."""
        return Adjustment(self._bias, self._biased, self._repeated, self._penalties, slots)

    def logprobs(self, slot: int) -> list[TokenLogprob] | None:
        """Those of the last step, if the slot wants any."""
        if slot not in self._counts:
            return None
        rows = torch.full_like(self.logprob_tables.logprobs[slot], slot, dtype=torch.int64)
        positions = torch.arange(len(rows), device=rows.device)
        where = self.slots(rows, positions), positions
        _, logprobs, tokens, values = self.logprob_tables
        count = self._counts[slot]
        return token_logprobs(logprobs[where], tokens[where][:, :count], values[where][:, :count])
