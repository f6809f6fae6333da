"""What the requests of all slots ask of a pass over logits beyond the plain one, as operators read it. A row for each slot."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


class Bias(NamedTuple):
    """What is added to the soft-capped logits of rows, which belong to slots."""

    values: Tensor  # [S, V] float32
    used: Tensor  # [S] bool: whether the slot has any; if not, its values are not read
    slots: Tensor  # [R] int64

    @classmethod
    def none(cls, raw_logits: Tensor) -> "Bias":
        """Of rows in slots of their own."""
        num_rows, vocab_size = raw_logits.shape
        used = torch.zeros(num_rows, dtype=torch.bool, device=raw_logits.device)
        return cls(raw_logits.new_empty(0, vocab_size, dtype=torch.float32), used, torch.arange(num_rows, device=used.device))


class Filters(NamedTuple):
    """Of each slot. 0, 1 and 0 are off."""

    top_k: Tensor  # [S] int64
    top_p: Tensor  # [S] float32
    min_p: Tensor  # [S] float32

    @classmethod
    def off(cls, num_slots: int, device: torch.device | str = "cpu") -> "Filters":
        full = partial(torch.full, (num_slots,), device=device)
        return cls(top_k=full(0), top_p=full(1.0), min_p=full(0.0))


class LogprobTables(NamedTuple):
    """What each slot wants, and what it got at its last step."""

    counts: Tensor  # [S] int64: how many of the most likely tokens, at most K; -1: no log probabilities at all
    logprobs: Tensor  # [S, C] float32: of the argmax
    tokens: Tensor  # [S, C, K] int64, the likelier first; beyond the count undefined
    values: Tensor  # [S, C, K] float32: their log probabilities

    @classmethod
    def empty(cls, num_slots: int, canvas_length: int, most: int, device: torch.device | str = "cpu") -> "LogprobTables":
        """Nobody wants anything; what is not written stays -1."""

        def full(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((num_slots, *shape), -1, dtype=dtype, device=device)

        alternatives = canvas_length, most
        return cls(
            counts=full(torch.int64),
            logprobs=full(torch.float32, canvas_length),
            tokens=full(torch.int64, *alternatives),
            values=full(torch.float32, *alternatives),
        )
