"""Tool calls, taken out of an answer: `<|tool_call>call:name{key:value,…}<tool_call|>`.

    value   `<|"|>` text `<|"|>`  |  number  |  true  |  false  |  null  |  `{`key:value,…`}`  |  `[`value,…`]`
    key     bare, or a text in `<|"|>`; numbers are as in JSON, and finite; white space between the parts is free

What looks like a call but is none comes back as the text that it is, these tags included.
"""

import json
import math
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

from backend.chat.markup import Segment

CALL_OPEN, CALL_CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
TOOL_TAGS = (CALL_OPEN, CALL_CLOSE, QUOTE)

_MAX_DEPTH = 64
_NAME = re.compile(r"\s*call:([^\s{}]+)\s*(?=\{)")
_SPACE = re.compile(r"\s*")
_TEXT = re.compile(re.escape(QUOTE) + "(.*?)" + re.escape(QUOTE), re.DOTALL)
BARE_KEY = re.compile(r"[^\s:,{}\[\]<>\"]+(?: +[^\s:,{}\[\]<>\"]+)*")
_WORD = re.compile(r"[-+.\w]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_MAX_NUMBER_LENGTH = 300  # readers of JSON refuse or misread longer ones


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """`arguments` is the text of a JSON object; `id` is drawn at random."""

    name: str
    arguments: str
    id: str = field(default_factory=_new_id, compare=False)

    def as_message(self) -> dict:
        """As an assistant message of the OpenAI form lists it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCallParser:
    """One answer's parser. with_calls: else a call is text. keep_tags: tags outside calls stay in the text, else they are
    dropped."""

    def __init__(self, *, with_calls: bool = True, keep_tags: bool = False):
        self._with_calls, self._keep_tags = with_calls, keep_tags
        self._call: tuple[Segment, ...] | None = None  # of the call that has begun, its opening tag included

    def push(self, segments: Iterable[Segment], *, last: bool = False) -> tuple[str, list[ToolCall]]:
        """New text outside calls, and the calls that became complete."""
        text, calls = [], []
        begun = None if self._call is None else list(self._call)
        for segment in segments:
            tag = segment.text if segment.is_tag else ""
            if tag == CALL_OPEN and self._with_calls:
                text += self._as_text(begun or ())
                begun = [segment]
            elif begun is None:
                text += [segment.text] if not tag or self._keep_tags else []
            elif tag == CALL_CLOSE:
                if call := parse_call("".join(each.text for each in begun[1:])):
                    calls.append(call)
                else:
                    text += self._as_text((*begun, segment))
                begun = None
            else:
                begun.append(segment)
        if last:
            text += self._as_text(begun or ())
            begun = None
        self._call = None if begun is None else tuple(begun)
        return "".join(text), calls

    def _as_text(self, call: Iterable[Segment]) -> list[str]:
        """Of what is no call; as everywhere, without special tokens that are not to be kept."""
        return [each.text for each in call if not each.is_tag or self._keep_tags or each.text in TOOL_TAGS]


def parse_call(text: str) -> ToolCall | None:
    """The call that stands between the tags; None if it is malformed."""
    name = _NAME.match(text)
    if not name:
        return None
    try:
        arguments, end = _object(text, name.end(), 0)
    except _Malformed:
        return None
    return ToolCall(name=name[1], arguments=arguments) if _SPACE.fullmatch(text, end) else None


class _Malformed(Exception):
    pass


def _value(text: str, start: int, depth: int) -> tuple[str, int]:
    """The value at `start` as JSON, and where it ends."""
    if text.startswith("{", start):
        return _object(text, start, depth + 1)
    if text.startswith("[", start):
        return _list(text, start, depth + 1)
    if quoted := _TEXT.match(text, start):
        return json.dumps(quoted[1], ensure_ascii=False), quoted.end()
    word = _WORD.match(text, start)
    if word and (word[0] in ("true", "false", "null") or _is_number(word[0])):
        return word[0], word.end()
    raise _Malformed


def _is_number(word: str) -> bool:
    """1e999 is one in JSON, but infinite for who reads it: `read_json` would refuse the call when the client sends it back."""
    return len(word) <= _MAX_NUMBER_LENGTH and bool(_NUMBER.fullmatch(word)) and math.isfinite(float(word))


def _object(text: str, start: int, depth: int) -> tuple[str, int]:
    pairs: dict[str, str] = {}

    def pair(at: int) -> int:
        quoted = _TEXT.match(text, at)
        key = quoted or BARE_KEY.match(text, at)
        if not key:
            raise _Malformed
        name = json.dumps(quoted[1] if quoted else key[0], ensure_ascii=False)
        at = _skip(text, key.end())
        if not text.startswith(":", at):
            raise _Malformed
        pairs[name], at = _value(text, _skip(text, at + 1), depth)
        return at

    end = _items(text, start, "}", depth, pair)
    return "{" + ", ".join(f"{name}: {value}" for name, value in pairs.items()) + "}", end


def _list(text: str, start: int, depth: int) -> tuple[str, int]:
    values: list[str] = []

    def item(at: int) -> int:
        value, at = _value(text, at, depth)
        values.append(value)
        return at

    end = _items(text, start, "]", depth, item)
    return "[" + ", ".join(values) + "]", end


def _items(text: str, start: int, close: str, depth: int, read) -> int:
    """Reads what stands between brackets, separated by commas; `start` is at the opening one. Returns the end."""
    if depth > _MAX_DEPTH:
        raise _Malformed
    at = _skip(text, start + 1)
    if text.startswith(close, at):
        return at + 1
    while True:
        at = _skip(text, read(at))
        if text.startswith(close, at):
            return at + 1
        if not text.startswith(",", at):
            raise _Malformed
        at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()
