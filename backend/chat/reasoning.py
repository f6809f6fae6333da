"""The thought, taken out of an answer: `<|channel>thought\n … <channel|>`.

The channel's name is no part of the thought, nor is white space at its edges: an empty thought leaves no trace. A thought that
the text ends in is a thought too. A tool call ends a thought that was left open; inside a call nothing opens one.
"""

from collections.abc import Iterable, Sequence
from enum import Enum

from tokenizers import Tokenizer

from backend.chat.markup import Segment
from backend.chat.tools import CALL_CLOSE, CALL_OPEN

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
REASONING_TAGS = (CHANNEL_OPEN, CHANNEL_CLOSE)
_NAME = "thought"


class _Place(Enum):
    TEXT = "text"
    THOUGHT = "thought"
    CALL = "call"

    def after(self, tag: str, *, with_tools: bool) -> "_Place":
        """Where an answer is after a tag. Without tools a call is text."""
        if tag == CALL_OPEN:
            return _Place.CALL if with_tools else _Place.TEXT
        if self is _Place.CALL:
            return _Place.TEXT if tag == CALL_CLOSE else self
        return {CHANNEL_OPEN: _Place.THOUGHT, CHANNEL_CLOSE: _Place.TEXT}.get(tag, self)


def _first_place(in_thought: bool) -> _Place:
    return _Place.THOUGHT if in_thought else _Place.TEXT


class ReasoningParser:
    """One answer's parser. `in_thought`: the prompt has opened a thought, and its name, that the answer goes on with.
    `with_tools`: tool calls are expected; otherwise a call is text."""

    def __init__(self, *, in_thought: bool = False, with_tools: bool = False):
        self._place, self._with_tools = _first_place(in_thought), with_tools
        self._name_expected = False
        self._at_start = True  # of the thought: white space is dropped
        self._held = ""  # the beginning of a name, or white space that may be the thought's end

    def push(self, segments: Iterable[Segment]) -> tuple[str, list[Segment]]:
        """New text of the thought, and the segments that are not of it. Other tags inside a thought are dropped."""
        thought, rest = "", []
        for segment in segments:
            tag = segment.text if segment.is_tag else ""
            before, self._place = self._place, self._place.after(tag, with_tools=self._with_tools)
            if before is _Place.THOUGHT and self._place is not _Place.THOUGHT:
                thought += self._close()
            if tag in REASONING_TAGS and before is not _Place.CALL:
                if self._place is _Place.THOUGHT and before is not _Place.THOUGHT:
                    self._name_expected = self._at_start = True
            elif self._place is not _Place.THOUGHT:
                rest.append(segment)
            elif not tag:
                thought += self._take(segment.text)
        return thought, rest

    def _take(self, text: str) -> str:
        text = self._held + text
        if self._name_expected:
            if _NAME.startswith(text):
                self._held = text
                return ""
            self._name_expected = False
            after = text.removeprefix(_NAME)
            if after[0].isspace():  # else the word only begins with the name
                text = after
        if self._at_start:
            text = text.lstrip()
        decided = text.rstrip()
        self._at_start = self._at_start and not decided
        self._held = text[len(decided) :]
        return decided

    def _close(self) -> str:
        unnamed = self._held if self._name_expected and self._held != _NAME else ""
        self._name_expected = False
        self._held = ""
        return unnamed


class ThoughtTokens:
    """Counts the tokens of one answer's thought, its tags left out.

    in_thought, with_tools: as for the parser. prefill: what the prompt already has of the answer.
    """

    def __init__(self, tokenizer: Tokenizer, *, in_thought: bool = False, with_tools: bool = False, prefill: str = ""):
        self._place, self._with_tools = _first_place(in_thought), with_tools
        self._tags = {tokenizer.token_to_id(tag): tag for tag in (*REASONING_TAGS, CALL_OPEN, CALL_CLOSE)}
        self.count(tokenizer.encode(prefill, add_special_tokens=False).ids)

    def count(self, token_ids: Sequence[int]) -> int:
        """How many of the answer's next tokens are of the thought."""
        number = 0
        for token_id in token_ids:
            if tag := self._tags.get(token_id):
                self._place = self._place.after(tag, with_tools=self._with_tools)
            else:
                number += self._place is _Place.THOUGHT
        return number
