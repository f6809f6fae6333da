"""What the requests of all slots ask of a pass over logits beyond the plain one, as operators read it. A row for each slot."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor


def num_words(vocab_size: int) -> int:
    """Of a set of tokens: see `token_words`."""
    return -(-vocab_size // 32)


def token_words(token_ids: Sequence[int], vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
    """A set of tokens: bit t % 32 of word t // 32 says whether t is in it; [num_words] int32."""
    bits = torch.zeros(num_words(vocab_size), 32, dtype=torch.int32, device=device)
    bits.view(-1)[torch.as_tensor(token_ids, dtype=torch.int64, device=device)] = 1
    return (bits << torch.arange(32, dtype=torch.int32, device=device)).sum(dim=1, dtype=torch.int32)


class Adjustment(NamedTuple):
    """What becomes of the soft-capped logits of rows, which belong to slots, before the temperature.

    1. A repeated token's logit is divided by the penalty where it is positive, and else multiplied with it.
    2. The bias is added.
    """

    bias: Tensor  # [S, V] float32
    biased: Tensor  # [S] bool: whether the slot has a bias; if not, it is not read
    repeated: Tensor  # [S, num_words] int32: `token_words`
    penalties: Tensor  # [S] float32, above 0; where it is 1, `repeated` is not read
    slots: Tensor  # [R] int64

    @classmethod
    def none(cls, raw_logits: Tensor) -> "Adjustment":
        """Of rows in slots of their own."""
        num_rows, vocab_size = raw_logits.shape
        return cls(
            bias=raw_logits.new_empty(0, vocab_size, dtype=torch.float32),
            biased=raw_logits.new_zeros(num_rows, dtype=torch.bool),
            repeated=raw_logits.new_empty(0, num_words(vocab_size), dtype=torch.int32),
            penalties=raw_logits.new_ones(num_rows, dtype=torch.float32),
            slots=torch.arange(num_rows, device=raw_logits.device),
        )


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
