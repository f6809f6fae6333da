"""How an answer is held to a grammar, canvas by canvas.

All tokens of a canvas are denoised together, so what a token may be depends on tokens that are not there yet. Therefore the
grammar is applied between canvases, and to the one token that depends on none:

1. The first token of a canvas is one that the grammar allows there: all others are as good as impossible (`allowed`).
2. Of a finished canvas the longest beginning that the grammar accepts is kept, and what can only follow it is added (`fitted`).
3. The next canvas begins behind that, until nothing can follow, or the model ends the answer where the grammar lets it end.

An answer that the model writes rightly by itself takes no step more than without a grammar. A departure costs the rest of its
canvas; every canvas adds at least one token.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import takewhile

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from backend.errors import RequestError
from backend.grammar import Grammar
from backend.grammar_check import told
from backend.sampling_config import ResolvedSampling
from backend.text_stream import special_tokens
from contract.manifest import ManifestError

_KEPT_MATCHERS = 32
"""Of grammars as requests bring them. One may take half a second to make, and microseconds to copy."""


class Grammars:
    """Makes the grammars of requests for one tokenizer.

    llguidance's own form of a tokenizer takes 4 seconds and 180 MB for 262,144 tokens: a thread sees to it from the start.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._vocab_size = vocab_size
        self._special = np.array([token for token in sorted(special_tokens(tokenizer)) if token < vocab_size], dtype=np.int64)
        self._matcher = lru_cache(_KEPT_MATCHERS)(self._new_matcher)
        thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._tokenizer = thread.submit(_as_llguidance_has_it, tokenizer, vocab_size)
        thread.shutdown(wait=False)

    def prepare(self) -> None:
        """Waits until no request would have to. Raises ManifestError for a tokenizer of which llguidance makes nothing."""
        self._tokenizer.result()

    def answer(self, sampling: ResolvedSampling) -> "AnswerGrammar":
        """Of a request with a grammar. Raises RequestError INVALID_ARGUMENT for what only the tokenizer shows to be wrong."""
        return AnswerGrammar(
            self._matcher(sampling.grammar).deep_copy(), self._tokenizer.result(), sampling, self._special, self._vocab_size
        )

    def _new_matcher(self, grammar: Grammar) -> LLMatcher:
        limits = LLParserLimits(max_items_in_row=grammar.max_readings, verbose_errors=False)
        return LLMatcher(self._tokenizer.result(), grammar.text, log_level=0, limits=limits)


def _as_llguidance_has_it(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    """Raises ManifestError."""
    vocabulary = tokenizer.get_vocab()
    token, highest = max(vocabulary.items(), key=lambda item: item[1], default=("", 0))
    if highest >= vocab_size + len(vocabulary):  # llguidance takes memory for every id below: with billions the process ends
        raise _damaged(f"the id {highest} of the token {token!r} among {len(vocabulary)} tokens")
    try:
        return LLTokenizer(tokenizer.to_str())
    except BaseException as error:  # a panic of its Rust is no Exception; and nothing interrupts this thread
        raise _damaged(f"what llguidance refuses: {told(str(error))}") from error


def _damaged(got: str) -> ManifestError:
    return ManifestError(
        f"tokenizer.json: got {got}; expected that of the checkpoint; download it again, and build the engine again"
    )


class AnswerGrammar:
    """How far one answer is in its grammar. `special`: the tokenizer's special tokens that the model has."""

    def __init__(
        self, matcher: LLMatcher, tokenizer: LLTokenizer, sampling: ResolvedSampling, special: np.ndarray, vocab_size: int
    ):
        self._matcher, self._special = matcher, special
        self._eos_token_ids, self._vocab_size = frozenset(sampling.eos_token_ids), vocab_size
        self._num_known = tokenizer.vocab_size
        self._stop_token_ids = frozenset(sampling.stop_token_ids) - self._eos_token_ids
        self._ends_of_tokenizer = frozenset(tokenizer.eos_tokens)  # llguidance's, which the request may ignore
        self._grammar = sampling.grammar
        self._check(self._matcher)

    def allowed(self) -> np.ndarray:
        """Which tokens may come next: [V] bool. An end-of-sequence token may where the answer may end, a stop token anywhere.

        Raises RequestError INVALID_ARGUMENT if none may, or if finding out takes too long."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check(self._matcher)
        allowed = np.zeros(self._vocab_size, dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        allowed[: len(known)] = known
        for token in self._special[allowed[self._special]].tolist():
            # llguidance makes special tokens of texts that look like them, and accepts no such token.
            allowed[token] = self._matcher.deep_copy().try_consume_tokens([token]) == 1
        may_end = self._matcher.is_accepting()
        for tokens, value in ((self._ends_of_tokenizer, False), (self._eos_token_ids, may_end)):
            allowed[[token for token in tokens if token < self._vocab_size]] = value
        if not allowed.any():
            raise self._grammar.refusal("no token of the vocabulary can follow")
        allowed[[token for token in self._stop_token_ids if token < self._vocab_size]] = True
        return allowed

    def fitted(self, tokens: list[int], end_token: int | None, room: int) -> tuple[list[int], list[int], str | None]:
        """Of a canvas' tokens, at most `room`, those that are kept; what can only follow them, no more than there is room for;
        and the reason to finish there: "stop", "length" or None. Changes nothing.

        end_token: the end-of-sequence or stop token behind them; the latter ends an answer wherever it stands.
        """
        matcher = self._matcher.deep_copy()
        count = matcher.try_consume_tokens(list(takewhile(self._is_text, tokens)))
        is_end = end_token in self._stop_token_ids or (end_token in self._eos_token_ids and matcher.is_accepting())
        if count == len(tokens) and is_end:
            return tokens, [], "stop"
        added = [] if matcher.is_stopped() else self._within_vocabulary(matcher.compute_ff_tokens())
        added = added[: matcher.deep_copy().try_consume_tokens(added)]
        before_stop = list(takewhile(lambda token: token not in self._stop_token_ids, added))
        if len(before_stop) < len(added) and count + len(before_stop) < room:
            return tokens[:count], before_stop, "stop"
        matcher.try_consume_tokens(added)
        self._check(matcher)
        if not count + len(added):
            raise RequestError("INTERNAL", f"{self._grammar.of}: a canvas begins with a token that was not allowed there")
        is_complete = matcher.is_stopped() and count + len(added) <= room
        reason = "stop" if is_complete else "length" if count + len(added) >= room else None
        return tokens[:count], added[: room - count], reason

    def _is_text(self, token: int) -> bool:
        """Whether llguidance may look at it: it has no end, and a model may have more tokens than its tokenizer."""
        return token < self._num_known and token not in self._ends_of_tokenizer

    def _within_vocabulary(self, tokens: list[int]) -> list[int]:
        """The first of them, that the model has: a tokenizer may have more."""
        return list(takewhile(lambda token: token < self._vocab_size, tokens))

    def take(self, tokens: list[int]) -> None:
        """They are part of the answer."""
        self._matcher.consume_tokens(tokens)

    def _check(self, matcher: LLMatcher) -> None:
        if matcher.is_error():
            raise self._grammar.refusal(told(matcher.get_error()))
