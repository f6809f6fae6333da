"""A text that comes in pieces → plain text and tags.

The tags are the special tokens of a tokenizer as text. Where one tag begins inside another, the one that begins first wins, and
of two that begin together the longer. The segments, put together, are the text, however it was split into pieces; plain text
comes out as soon as no tag can begin in it.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple


class Segment(NamedTuple):
    """Plain text, never empty and without a complete tag, or exactly one tag."""

    text: str
    is_tag: bool


class TagSet:
    """The tags to look for; thousands are looked up as fast as one. Made once, used by every splitter."""

    def __init__(self, tags: Iterable[str]):
        self._tags = frozenset(tags)
        assert all(self._tags), "an empty tag is everywhere"
        self._beginnings = frozenset(tag[:end] for tag in self._tags for end in range(1, len(tag)))
        first = "".join(re.escape(character) for character in sorted({tag[0] for tag in self._tags}))
        self._first = re.compile(f"[{first}]" if first else r"(?!)")

    def find(self, text: str, start: int) -> int:
        """Where a tag may begin, from `start` on; the text's length if nowhere."""
        found = self._first.search(text, start)
        return found.start() if found else len(text)

    def longest_at(self, text: str, start: int) -> tuple[str, bool]:
        """The longest tag at `start`, "" if there is none, and whether more text could make it a longer one."""
        longest = ""
        for end in range(start + 1, len(text) + 1):
            candidate = text[start:end]
            if candidate in self._tags:
                longest = candidate
            if candidate not in self._beginnings:
                return longest, False
        return longest, True


class TagSplitter:
    """The splitter of one text. What may be the beginning of a tag is held back until more of the text decides it."""

    def __init__(self, tags: TagSet):
        self._tags = tags
        self._held = ""

    def push(self, text: str, *, last: bool = False) -> list[Segment]:
        """Takes more text; `last` says that there will be no more, so that nothing is held back."""
        text = self._held + text
        segments: list[Segment] = []
        plain_from = 0
        at = self._tags.find(text, 0)
        while at < len(text):
            tag, is_open = self._tags.longest_at(text, at)
            if is_open and not last:
                break
            if tag:
                if at > plain_from:
                    segments.append(Segment(text[plain_from:at], False))
                segments.append(Segment(tag, True))
                plain_from = at + len(tag)
            at = self._tags.find(text, at + max(1, len(tag)))
        if at > plain_from:
            segments.append(Segment(text[plain_from:at], False))
        self._held = text[at:]
        return segments
