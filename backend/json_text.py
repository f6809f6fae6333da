"""JSON as it is taken from clients: what can be written as JSON again, in UTF-8, and means one thing; and objects from a
checkpoint's files."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from backend.errors import refused
from backend.parameters import shown


def read_json(text: str) -> Any:
    """The value in `text`.

    Raises ValueError that says what was got: malformed JSON, a key twice, NaN, a number beyond every float, an integer of
    thousands of digits, half of a surrogate pair, or too many brackets within brackets.
    """
    try:
        text.encode()
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)
        if "\\ud" in text or "\\uD" in text:  # else no half can be there, and writing takes long for images
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON ({error.msg} at character {error.pos})") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except ValueError as error:
        if str(error).startswith("Exceeds the limit"):  # Python's line, with advice that only a program can follow
            raise ValueError(f"an integer of more than {sys.get_int_max_str_digits()} digits") from None
        raise
    return value


def parse_json_object(name: str, text: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises RequestError INVALID_ARGUMENT if it is anything else or repeats a key."""
    return parsed_json(name, text, dict, 'a JSON object like {"max_tokens": 64}')


def parsed_json(name: str, text: str, kind: type, wanted: str) -> Any:
    """The value of this kind in `text`, which came as the parameter `name`. Raises RequestError INVALID_ARGUMENT."""
    try:
        value = read_json(text)
    except ValueError as error:
        raise refused(f"{name}: got {error}: {shown(text)}; expected {wanted}") from None
    if not isinstance(value, kind):
        raise refused(f"{name}: got {shown(text)}; expected {wanted}")
    return value


def json_object(text: str | bytes, path: Path) -> dict[str, Any]:
    """The object in the file at `path`. Raises ValueError, one line that begins with the path, for what is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}; copy the file from the checkpoint again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got {shown(value)}, expected a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        [(key, count)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} {count} times")
    return unique


def _finite(number: str) -> float:
    """1e999 is a JSON number, but an infinite float, which nothing behind here can be sent."""
    if math.isinf(value := float(number)):
        raise ValueError(f"{number}, which is more than numbers can be")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is not a JSON number")
