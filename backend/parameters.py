"""What a number of a configuration may be: type and range, and one line that says so when it is not.

Every failure is a ValueError of the form `name: got VALUE, expected WHAT`; who catches it knows whether a request or a file
is at fault.
"""

import json
import math
import numbers
import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Number:
    """An integer or a finite real number from `minimum` to `maximum`, both included, or 0 where `zero` says what 0 means.

    rounds_down: with `zero`, what lies between 0 and `minimum` counts as 0; else it is refused."""

    kind: type  # int or float
    minimum: float
    maximum: float | None = None
    zero: str | None = None
    rounds_down: bool = False

    def checked(self, name: str, value: object) -> int | float:
        """`value` as an int or float; raises ValueError. A bool is not a number here, nor is a string."""
        wanted = numbers.Integral if self.kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, wanted) or not self._contains(value):
            raise ValueError(f"{name}: got {shown(value)}, expected {self.expected()}")
        return self.kind(0 if self.rounds_down and value < self.minimum else value)

    def coerced(self, value: object) -> object:
        """The number that a string or an integral float stands for; anything else as it is, for `checked` to refuse."""
        if isinstance(value, str):
            return _from_text(value.strip(), self.kind)
        if self.kind is int and isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
            return int(value)
        return value

    def expected(self) -> str:
        below = f", as is less than {self.minimum}" if self.rounds_down else ""
        zero = f"0 ({self.zero}{below}) or " if self.zero else ""
        what = "an integer" if self.kind is int else "a finite number"
        limits = f"of at least {self.minimum}" if self.maximum is None else f"from {self.minimum} to {self.maximum}"
        return f"{zero}{what} {limits}"

    def _contains(self, value) -> bool:
        try:
            if not math.isfinite(float(value)):
                return False
        except OverflowError:  # an integer beyond every float
            return False
        if value >= self.minimum:
            return self.maximum is None or value <= self.maximum
        return self.zero is not None and (value >= 0 if self.rounds_down else value == 0)


def checked_flag(name: str, value: object) -> bool:
    """`value` if it is a bool; raises ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {shown(value)}, expected true or false")
    return value


def coerced_flag(value: object) -> object:
    """The bool that "true" or "false" in any case stands for; anything else as it is."""
    return {"true": True, "false": False}.get(value.strip().lower(), value) if isinstance(value, str) else value


def shown(value: object) -> str:
    """`value` as an error message shows it: one line, at most 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def shown_json(value: object) -> str:
    """As `shown`, but null, true and false as JSON has them."""
    return json.dumps(value) if value is None or isinstance(value, bool) else shown(value)


def _from_text(text: str, kind: type) -> object:
    if kind is int:
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,40}", text) else text
    try:
        return float(text)
    except ValueError:
        return text


INT32_MAX = (1 << 31) - 1
MOST_ALTERNATIVES = 20  # of a place, with log probabilities; OpenAI's limit

# Limits beyond those of transformers: temperatures stay where float32 logits / temperature cannot overflow (30 / 2e-9 is far
# from it); steps stay exact in float32; entropy_bound 0 (one token a step) and confidence_threshold 0 (never early) are
# allowed, and what float32 cannot hold is not (the largest sum of a canvas' entropies is a few thousand nats).
# Who asks for a temperature below the limit, as evaluation clients do, wants the most likely tokens, which 0 gives. The limit
# itself would not do: it scales the schedule, so that the first step would accept the whole canvas (`SamplingConfig.resolve`).
NUMBERS = {
    "max_tokens": Number(kind=int, minimum=1, maximum=INT32_MAX),
    "min_tokens": Number(kind=int, minimum=0, maximum=INT32_MAX),
    "temperature": Number(kind=float, minimum=0.01, maximum=100, zero="greedy", rounds_down=True),
    "top_k": Number(kind=int, minimum=-1, maximum=INT32_MAX),
    "top_p": Number(kind=float, minimum=0, maximum=1),
    "min_p": Number(kind=float, minimum=0, maximum=1),
    "repetition_penalty": Number(kind=float, minimum=0.01, maximum=100),
    "frequency_penalty": Number(kind=float, minimum=-2, maximum=2),
    "presence_penalty": Number(kind=float, minimum=-2, maximum=2),
    "t_min": Number(kind=float, minimum=0, maximum=100),
    "t_max": Number(kind=float, minimum=0.01, maximum=100),
    "seed": Number(kind=int, minimum=0, maximum=(1 << 64) - 1),
    "max_denoising_steps": Number(kind=int, minimum=1, maximum=65_536),
    "entropy_bound": Number(kind=float, minimum=0, maximum=1_000_000),
    "stability_threshold": Number(kind=int, minimum=0, maximum=INT32_MAX),
    "confidence_threshold": Number(kind=float, minimum=0, maximum=1_000_000),
    "top_logprobs": Number(kind=int, minimum=0, maximum=MOST_ALTERNATIVES),
}
TOKEN_ID = Number(kind=int, minimum=0, maximum=INT32_MAX)
LOGIT_BIAS = Number(kind=float, minimum=-100, maximum=100)
