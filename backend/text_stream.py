"""The text of one request, decoded as its tokens come, cut at its stop strings and behind what is to be its last span.

The texts returned, put together, equal the decoding of all tokens at once, up to the stop string, however the tokens were
split over calls. To keep that promise some text is held back until more tokens decide it: an incomplete character, and an
ending that may be the beginning of a stop string.

Decoding is linear: a token is decoded once, together with the one token before it, which gives the decoder the context that
leading spaces depend on.
"""

import copy
import itertools
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from tokenizers import Tokenizer

# A byte-fallback decoder reads a run of these as one: the characters if the whole run is UTF-8, else one U+FFFD a byte.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True)
class StopScope:
    """In which text stop strings are looked for: not in that of `hidden` tokens, nor in what follows one of `opening` up to the
    next one of `closing`. is_open: the text begins behind an opening token. All are token ids; opening and closing tokens are
    hidden, too. No stop string is found across what is left out.

    last: (opening token, closing token) of a span that the text ends behind, the first to be complete; opening None: the text
    begins inside it. None: of no span.
    """

    hidden: frozenset[int] = frozenset()
    opening: frozenset[int] = frozenset()
    closing: frozenset[int] = frozenset()
    is_open: bool = False
    last: tuple[int | None, int] | None = None


EVERYWHERE = StopScope()


class TextDelta(NamedTuple):
    """What a call to `TextStream.push` adds."""

    text: str  # new text
    num_tokens: int  # tokens, from the request's first, that are in the result whatever follows; never decreases
    stopped: bool  # a stop string or the last span ended the text: `num_tokens` is then the length of the result


class _Piece(NamedTuple):
    """Some decoded text not returned yet, and the tokens it came from: from `first_token` up to `end_token`. in_scope: stop
    strings are looked for in it."""

    text: str
    first_token: int
    end_token: int
    in_scope: bool


@lru_cache(maxsize=4)  # going through thousands of added tokens takes milliseconds, which a request need not
def special_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special)


class TextStream:
    """One request's decoder.

    tokenizer: the engine directory's tokenizer.json. stop: the text ends before the first of these to be complete (of several
    that end at one character, the longest). skip_special_tokens: special tokens give no text. stop_scope: where to look for
    stop strings, and behind what the text ends without one.

    A result that a stop string ends keeps every token before the one that the stop string begins in, and keeps that one too
    if some of its text comes before the stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        stop_scope: StopScope = EVERYWHERE,
    ):
        self._tokenizer = tokenizer
        self._stop, self._scope = tuple(stop), stop_scope
        self._is_open = stop_scope.is_open
        self._opening, self._closing = stop_scope.last or (-1, -1)  # no tokens
        self._in_last, self._is_complete = self._opening is None, False
        self._skipped = special_tokens(tokenizer) if skip_special_tokens else frozenset()
        self._num_tokens = 0
        self._context: list[int] = []  # the last decided token
        self._context_length = 0  # characters it decodes to on its own
        self._undecided: list[tuple[int, int]] = []  # (position in the request, id) of tokens with an incomplete character
        self._in_byte_run = False
        self._pieces: deque[_Piece] = deque()
        self._ended = False

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> TextDelta:
        """Takes the request's next tokens; `last` says that there will be no more, so that nothing is held back.

        1. Decode what the tokens decide, up to the end of the last span: there will be no more then.
        2. Return the text before a stop string, if one is complete.
        3. Else return all but the longest ending that a stop string may begin with.
        """
        assert not self._ended, "push after the last tokens or after the text has stopped"
        for token_id in token_ids:  # 1.
            self._take(token_id)
            if self._is_complete:
                last = True
                break
        if last:
            self._decide_all()

        text = "".join(piece.text for piece in self._pieces)
        found = self._found()
        length = len(text)
        if found is not None:  # 2.
            length = found
        elif not last:  # 3.
            length -= self._held_length()
        self._ended = last or found is not None
        self._drop(length)
        return TextDelta(text[:length], self._num_kept(), self._is_complete or found is not None)

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
        is_hidden = token_id in self._scope.hidden
        if is_hidden or (self._in_byte_run and not is_byte):
            self._decide_all()
        self._undecided.append((position, token_id))
        self._in_byte_run = is_byte
        if is_hidden:  # its text is its own
            self._decide(self._decode_undecided(), in_scope=False)
            self._is_open = token_id in self._scope.opening or (self._is_open and token_id not in self._scope.closing)
            self._is_complete = self._in_last and token_id == self._closing
            self._in_last = self._in_last or token_id == self._opening
            return
        if is_byte or not _worth_decoding(len(self._undecided)):
            return
        text = self._decode_undecided()
        if not text.endswith(_REPLACEMENT):  # what a byte-level decoder makes of an unfinished character
            self._decide(text, in_scope=not self._is_open)

    def _decide_all(self) -> None:
        if self._undecided:
            self._decide(self._decode_undecided(), in_scope=not self._is_open)

    def _decode_undecided(self) -> str:
        return self._decode(self._context + [token_id for _, token_id in self._undecided])[self._context_length :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _decide(self, text: str, *, in_scope: bool) -> None:
        """The undecided tokens decode to `text`, whatever follows."""
        positions = [position for position, _ in self._undecided]
        self._pieces.extend(piece for piece in _split(text, positions, in_scope) if piece.text)
        self._context = [self._undecided[-1][1]]
        self._context_length = len(self._decode(self._context))
        self._undecided = []
        self._in_byte_run = False

    def _found(self) -> int | None:
        """Length of the text before the stop string that is complete first."""
        start = 0
        for in_scope, pieces in itertools.groupby(self._pieces, key=lambda piece: piece.in_scope):
            text = "".join(piece.text for piece in pieces)
            found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0] if in_scope else []
            if found:
                return start + min(found)[1]
            start += len(text)
        return None

    def _held_length(self) -> int:
        """Length of the longest ending of the pieces' text that is the beginning of a stop string, but not all of it."""
        last = itertools.takewhile(lambda piece: piece.in_scope, reversed(self._pieces))
        text = "".join(reversed([piece.text for piece in last]))
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
                self._pieces.appendleft(_Piece(piece.text[length:], piece.end_token, piece.end_token, piece.in_scope))
                return
            length -= len(piece.text)

    def _num_kept(self) -> int:
        """Tokens before the first character that was not returned."""
        if self._pieces:
            return self._pieces[0].first_token
        return self._undecided[0][0] if self._undecided else self._num_tokens


def _split(text: str, positions: list[int], in_scope: bool) -> list[_Piece]:
    """The text of tokens that were decided together, as finely as it can be told which token gave which character.

    A run of byte tokens gives a byte a token if it is UTF-8, else a U+FFFD a token. All else stays whole: the characters
    share tokens.
    """
    widths = [len(character.encode()) for character in text]
    if sum(widths) != len(positions):
        widths = [1] * len(text)
    if sum(widths) != len(positions):
        return [_Piece(text, positions[0], positions[-1] + 1, in_scope)]
    pieces, start = [], 0
    for character, width in zip(text, widths, strict=True):
        pieces.append(_Piece(character, positions[start], positions[start + width - 1] + 1, in_scope))
        start += width
    return pieces


def _worth_decoding(num_undecided: int) -> bool:
    """A character has at most 4 bytes, so a longer wait is for garbage; decoding that at doubling lengths keeps it linear."""
    return num_undecided <= 4 or num_undecided & (num_undecided - 1) == 0
