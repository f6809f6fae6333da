"""What the first tokens of a canvas may be, where it is not every token."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Opening(NamedTuple):
    """The canvas' first `num_places` tokens, all of them if it has no more, are among `allowed` [V] bool."""

    allowed: np.ndarray
    num_places: int = 1

    @classmethod
    def without(cls, token_ids: Iterable[int], vocab_size: int, num_places: int) -> "Opening":
        """None of these tokens."""
        return cls(~np.isin(np.arange(vocab_size), list(token_ids)), num_places)
