"""The thought, taken out of an answer: `<|channel>thought\n … <channel|>`.

The channel's name is no part of the thought, nor is white space at its edges: an empty thought leaves no trace. A thought that
the text ends in is a thought too. A tool call ends a thought that was left open.
"""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

from backend.chat.markup import Segment
from backend.chat.tools import CALL_OPEN

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
REASONING_TAGS = (CHANNEL_OPEN, CHANNEL_CLOSE)
_NAME = "thought"


class ReasoningParser:
    """One answer's parser. `in_thought`: the prompt has opened a thought, and its name, that the answer goes on with."""

    def __init__(self, *, in_thought: bool = False):
        self._in_thought = in_thought
        self._name_expected = False
        self._at_start = True  # of the thought: white space is dropped
        self._held = ""  # the beginning of a name, or white space that may be the thought's end

    def push(self, segments: Iterable[Segment]) -> tuple[str, list[Segment]]:
        """New text of the thought, and the segments that are not of it. Other tags inside a thought are dropped."""
        thought, rest = "", []
        for segment in segments:
            tag = segment.text if segment.is_tag else ""
            if tag == CHANNEL_OPEN:
                if not self._in_thought:
                    self._in_thought = self._name_expected = self._at_start = True
            elif tag == CHANNEL_CLOSE:
                thought += self._close()
            elif tag == CALL_OPEN:
                thought += self._close()
                rest.append(segment)
            elif not self._in_thought:
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
        self._in_thought = self._name_expected = False
        self._held = ""
        return unnamed


class ThoughtTokens:
    """Counts the tokens of one answer's thought, its tags left out."""

    def __init__(self, tokenizer: Tokenizer, *, in_thought: bool = False):
        self._in_thought = in_thought
        self._in_thought_after = {
            tokenizer.token_to_id(tag): in_thought
            for tag, in_thought in ((CHANNEL_OPEN, True), (CHANNEL_CLOSE, False), (CALL_OPEN, False))
        }

    def count(self, token_ids: Sequence[int]) -> int:
        """How many of the answer's next tokens are of the thought."""
        number = 0
        for token_id in token_ids:
            if token_id in self._in_thought_after:
                self._in_thought = self._in_thought_after[token_id]
            else:
                number += self._in_thought
        return number
