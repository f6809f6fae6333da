"""The keys of one JSON object of a `config.json`: each is taken once, as a value of its kind, and what is left over is unknown.

What is wrong is added to a list of problems, one line each, and reading goes on with a value of the right kind.
"""

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from contract.model_config import INT32_MAX, SOFT_TOKEN_BUDGETS

_MOST_COUNTED = 4096


class Kind(NamedTuple):
    """Values that a key may have: how a message names them, and which they are."""

    expected: str
    holds: Callable[[Any], bool]

    def or_null(self) -> "Kind":
        return Kind(f"{self.expected} or null", lambda value: value is None or self.holds(value))


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_token_id(value: Any) -> bool:
    return _is_integer(value, 0, INT32_MAX)


SIZE = Kind(f"a positive integer of at most {INT32_MAX}", lambda value: _is_integer(value, 1, INT32_MAX))
COUNT = Kind(f"a positive integer of at most {_MOST_COUNTED}", lambda value: _is_integer(value, 1, _MOST_COUNTED))
"""Of layers or experts: each has names of its own, and what is wrong with a number of a billion is to be told before they are
made."""
POSITIVE = Kind("a positive number", lambda value: _is_number(value) and value > 0)
FRACTION = Kind("a number above 0 and at most 1", lambda value: _is_number(value) and 0 < value <= 1)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))
TOKEN_ID = Kind("a token id", _is_token_id)
TOKEN_IDS = Kind(
    "a token id or a list of them",
    lambda value: _is_token_id(value) or (isinstance(value, list) and all(map(_is_token_id, value))),
)
SOFT_TOKENS = Kind(
    f"one of {', '.join(map(str, SOFT_TOKEN_BUDGETS))}",
    lambda value: _is_integer(value, SOFT_TOKEN_BUDGETS[0], SOFT_TOKEN_BUDGETS[-1]) and value in SOFT_TOKEN_BUDGETS,
)


class Fields:
    """The keys of `values`; `where` is what messages put before a key's name."""

    def __init__(self, values: dict[str, Any], where: str, problems: list[str]):
        self._values, self._where, self._problems = dict(values), where, problems

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def take(self, key: str, default: Any = None) -> Any:
        return self._values.pop(key, default)

    def take_a(self, kind: Kind, key: str, default: Any = None) -> Any:
        """A value of `kind`; `default` where the key is missing, and after a problem."""
        if key not in self:
            return default
        value = self.take(key)
        if kind.holds(value):
            return value
        self._problems.append(f"{self._where}{key}: got {value!r}, expected {kind.expected}")
        return default

    def take_size(self, key: str, default: int | None = None, kind: Kind = SIZE) -> int:
        """A value of `kind`, SIZE or COUNT; a problem, and 1 to go on with, where it is not."""
        value = self.take(key, default)
        if kind.holds(value):
            return value
        got = "nothing" if value is None else repr(value)
        self._problems.append(f"{self._where}{key}: got {got}, expected {kind.expected}")
        return 1

    def take_fixed(self, key: str, expected: Any, why: str) -> None:
        value = self.take(key, expected)
        if value != expected:
            self._problems.append(f"{self._where}{key}: got {value!r}, expected {expected!r}; {why}")

    def finish(self, ignored: Collection[str] = ()) -> None:
        """Each key that is left, and not `ignored`, is a problem."""
        for key in sorted(set(self._values) - set(ignored)):
            self._problems.append(f"{self._where}{key}: unknown key; this builder does not know what it changes")
