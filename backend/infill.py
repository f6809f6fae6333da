"""An answer of which the request gives parts: texts and token ids that stand where they are, and blanks that the model fills.

    ["The capital of France is ", 3, ".<turn|>"]  ──tokens──▶  (818, 5279, …, BLANK, BLANK, BLANK, 236761, 106)

A canvas is denoised with the given tokens in their places from the first step on, so that blanks are filled to fit what stands
before and after them. What follows the last part is the model's own. Whatever is refused raises one line.
"""

import numbers
from collections.abc import Callable, Sequence

from backend.errors import refused
from backend.parameters import TOKEN_ID, Number, shown

BLANK = -1  # in place of a token: the model's to fill
MAX_PARTS, MAX_LENGTH = 1024, 16_384  # MAX_LENGTH: characters of all texts, and tokens; they are gone through while others wait
_WIDTH = Number(kind=int, minimum=1, maximum=MAX_LENGTH)

Part = str | int | tuple[int, ...]  # a text, the number of tokens of a blank, or token ids


def checked_parts(parts: object) -> tuple[Part, ...]:
    """`parts` with lists of token ids as tuples; raises ValueError."""
    if not isinstance(parts, list | tuple):
        raise ValueError(f"infill: got {shown(parts)}, expected a list of texts, numbers of free tokens and lists of token ids")
    if len(parts) > MAX_PARTS:
        raise ValueError(f"infill: got {len(parts)} parts, expected at most {MAX_PARTS}")
    for kind, what in ((str, "characters"), (list | tuple, "token ids")):
        if (length := sum(len(part) for part in parts if isinstance(part, kind))) > MAX_LENGTH:
            raise ValueError(f"infill: got {length} {what}, expected at most {MAX_LENGTH}")
    return tuple(_checked_part(f"infill[{index}]", part) for index, part in enumerate(parts))


def _checked_part(name: str, part: object) -> Part:
    if isinstance(part, list | tuple) and part:
        return tuple(TOKEN_ID.checked(name, token_id) for token_id in part)
    if isinstance(part, numbers.Integral) and not isinstance(part, bool):
        return _WIDTH.checked(name, part)
    if not isinstance(part, str) or not part:
        raise ValueError(
            f"{name}: got {shown(part)}, expected a non-empty text, a number of free tokens or a list of token ids"
        )
    return part


def infill_tokens(parts: Sequence[Part], tokenize: Callable[[str], list[int]] | None, max_tokens: int) -> tuple[int, ...]:
    """The answer's first tokens, BLANK in blanks. tokenize: see `SamplingConfig.resolve`.

    Raises RequestError INVALID_ARGUMENT for more than max_tokens, or than MAX_LENGTH."""
    placed = [tokenize(part) if isinstance(part, str) else part for part in parts]
    length = sum(part if isinstance(part, int) else len(part) for part in placed)
    if length > MAX_LENGTH:
        raise refused(f"infill: got {length} tokens, expected at most {MAX_LENGTH}; shorten it")
    if length > max_tokens:
        raise refused(
            f"infill: got {length} tokens, expected at most max_tokens, {max_tokens}; raise max_tokens or shorten infill"
        )
    return tuple(token for part in placed for token in ((BLANK,) * part if isinstance(part, int) else part))


def given_tokens(tokens: Sequence[int], canvas_index: int, canvas_length: int) -> list[int]:
    """Those of one canvas of `infill_tokens`, with BLANK behind the last of them."""
    of_it = list(tokens[canvas_index * canvas_length : (canvas_index + 1) * canvas_length])
    return of_it + [BLANK] * (canvas_length - len(of_it))
