"""The text of one request, decoded as its tokens come, cut at its stop strings.

The texts returned, put together, equal the decoding of all tokens at once, up to the stop string, however the tokens were
split over calls. To keep that promise some text is held back until more tokens decide it: an incomplete character, and an
ending that may be the beginning of a stop string.

Decoding is linear: a token is decoded once, together with the one token before it, which gives the decoder the context that
leading spaces depend on.
"""

import copy
import re
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

# A byte-fallback decoder reads a run of these as one: the characters if the whole run is UTF-8, else one U+FFFD a byte.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextDelta(NamedTuple):
    """What a call to `TextStream.push` adds."""

    text: str  # new text
    num_tokens: int  # tokens, from the request's first, that are in the result whatever follows; never decreases
    stopped: bool  # a stop string ended the text: `num_tokens` is then the length of the result


class _Piece(NamedTuple):
    """Some decoded text not returned yet, and the tokens it came from: from `first_token` up to `end_token`."""

    text: str
    first_token: int
    end_token: int


class TextStream:
    """One request's decoder.

    tokenizer: the engine directory's tokenizer.json. stop: the text ends before the first of these to be complete (of several
    that end at one character, the longest). skip_special_tokens: special tokens give no text.

    A result that a stop string ends keeps every token before the one that the stop string begins in, and keeps that one too
    if some of its text comes before the stop string.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        added = tokenizer.get_added_tokens_decoder()
        self._skipped = {index for index, token in added.items() if token.special} if skip_special_tokens else set()
        self._num_tokens = 0
        self._context: list[int] = []  # the last decided token
        self._context_length = 0  # characters it decodes to on its own
        self._undecided: list[tuple[int, int]] = []  # (position in the request, id) of tokens with an incomplete character
        self._in_byte_run = False
        self._pieces: deque[_Piece] = deque()
        self._ended = False

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> TextDelta:
        """Takes the request's next tokens; `last` says that there will be no more, so that nothing is held back.

        1. Decode what the tokens decide.
        2. Return the text before a stop string, if one is complete.
        3. Else return all but the longest ending that a stop string may begin with.
        """
        assert not self._ended, "push after the last tokens or after a stop string"
        for token_id in token_ids:  # 1.
            self._take(token_id)
        if last and self._undecided:
            self._decide(self._decode_undecided())

        text = "".join(piece.text for piece in self._pieces)
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:  # 2.
            _, length = min(found)
        else:  # 3.
            length = len(text) if last else len(text) - self._held_length(text)
        self._ended = last or bool(found)
        self._drop(length)
        return TextDelta(text[:length], self._num_kept(), bool(found))

    def fork(self) -> "TextStream":
        """A stream that goes on from here on its own: what is pushed to one of the two does not reach the other."""
        fork = copy.copy(self)
        fork._context, fork._undecided, fork._pieces = list(self._context), list(self._undecided), self._pieces.copy()
        return fork

    def _take(self, token_id: int) -> None:
        position = self._num_tokens
        self._num_tokens += 1
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._skipped:  # neither ends a run of byte tokens
            return
        is_byte = _BYTE_TOKEN.fullmatch(token) is not None
        if self._in_byte_run and not is_byte:
            self._decide(self._decode_undecided())
        self._undecided.append((position, token_id))
        self._in_byte_run = is_byte
        if is_byte or not _worth_decoding(len(self._undecided)):
            return
        text = self._decode_undecided()
        if not text.endswith(_REPLACEMENT):  # what a byte-level decoder makes of an unfinished character
            self._decide(text)

    def _decode_undecided(self) -> str:
        return self._decode(self._context + [token_id for _, token_id in self._undecided])[self._context_length :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _decide(self, text: str) -> None:
        """The undecided tokens decode to `text`, whatever follows."""
        positions = [position for position, _ in self._undecided]
        self._pieces.extend(piece for piece in _split(text, positions) if piece.text)
        self._context = [self._undecided[-1][1]]
        self._context_length = len(self._decode(self._context))
        self._undecided = []
        self._in_byte_run = False

    def _held_length(self, text: str) -> int:
        """Length of the longest ending of `text` that is the beginning of a stop string, but not all of it."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0

    def _drop(self, length: int) -> None:
        """Removes the first `length` characters from the pieces. The tokens of a piece that is cut in two are kept for good."""
        while length:
            piece = self._pieces.popleft()
            if length < len(piece.text):
                self._pieces.appendleft(_Piece(piece.text[length:], piece.end_token, piece.end_token))
                return
            length -= len(piece.text)

    def _num_kept(self) -> int:
        """Tokens before the first character that was not returned."""
        if self._pieces:
            return self._pieces[0].first_token
        return self._undecided[0][0] if self._undecided else self._num_tokens


def _split(text: str, positions: list[int]) -> list[_Piece]:
    """The text of tokens that were decided together, as finely as it can be told which token gave which character.

    A run of byte tokens gives a byte a token if it is UTF-8, else a U+FFFD a token. All else stays whole: the characters
    share tokens.
    """
    widths = [len(character.encode()) for character in text]
    if sum(widths) != len(positions):
        widths = [1] * len(text)
    if sum(widths) != len(positions):
        return [_Piece(text, positions[0], positions[-1] + 1)]
    pieces, start = [], 0
    for character, width in zip(text, widths, strict=True):
        pieces.append(_Piece(character, positions[start], positions[start + width - 1] + 1))
        start += width
    return pieces


def _worth_decoding(num_undecided: int) -> bool:
    """A character has at most 4 bytes, so a longer wait is for garbage; decoding that at doubling lengths keeps it linear."""
    return num_undecided <= 4 or num_undecided & (num_undecided - 1) == 0
