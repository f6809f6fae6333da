"""Log probabilities in the form of `/v1/completions`."""

from collections.abc import Mapping, Sequence
from typing import Any

from openai.types.completion_choice import Logprobs

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


class TextOffsets:
    """Where the tokens of one choice begin in its text, both of which come in parts.

    Tokens are found by their bytes: those that the text leaves out have none, and several tokens may be one character. They
    come with their text; some of the last one's may come later, or be cut off by a stop string.
    """

    def __init__(self):
        self._at = 0  # bytes of the text before the next token
        self._begun = 0  # characters that begin in them

    def next(self, tokens: Sequence[bytes], text: str) -> list[int]:
        """The places of the next tokens, in characters. tokens: their bytes. text: all of the choice's so far."""
        data = text.encode()
        places = []
        for token in tokens:
            goes_on = token != b"" and not _begun(token[:1])  # with a character that has begun
            places.append(self._begun - goes_on)
            if token.startswith(data[self._at : self._at + len(token)]):
                self._pass(token)
            elif data.startswith(_REPLACEMENT, self._at):  # for a byte that is of no character
                self._pass(_REPLACEMENT)
        return places

    def _pass(self, data: bytes) -> None:
        self._at += len(data)
        self._begun += _begun(data)


def completion_logprobs(entries: Sequence[Mapping[str, Any]], text: str, offsets: TextOffsets) -> Logprobs:
    """entries: of the next tokens, as in chat completions. text: all of the choice's so far."""
    return Logprobs(
        tokens=[entry["token"] for entry in entries],
        token_logprobs=[entry["logprob"] for entry in entries],
        top_logprobs=[_by_text(entry["top_logprobs"]) for entry in entries],
        text_offset=offsets.next([_bytes(entry) for entry in entries], text),
    )


def _by_text(alternatives: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The most likely comes first; of tokens that print alike it is the one that is named."""
    named: dict[str, float] = {}
    for each in alternatives:
        named.setdefault(each["token"], each["logprob"])
    return named


def _bytes(entry: Mapping[str, Any]) -> bytes:
    return entry["token"].encode() if entry["bytes"] is None else bytes(entry["bytes"])


def _begun(data: bytes) -> int:
    """How many characters begin in a piece of UTF-8."""
    return sum(byte & 0xC0 != 0x80 for byte in data)
