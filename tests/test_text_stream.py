"""Incremental decoding: equal to decoding everything at once, for three kinds of tokenizer, any split and any stop strings."""

import random
import runpy
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from backend.text_stream import EVERYWHERE, StopScope, TextStream

TINY_TOKENIZER = Path(__file__).parent.parent / "checkpoints" / "tiny_tokenizer.py"
WORDS = ["a", "b", " ", "  ", "ab", "é", "ß", "漢", "字", "😀", "👩‍👩‍👧", "\n", "Count from", "▁", "\N{REPLACEMENT CHARACTER}"]


def tiny() -> Tokenizer:
    """Gemma's kind: "▁" for a space, byte fallback."""
    return runpy.run_path(str(TINY_TOKENIZER))["build_tokenizer"]().backend_tokenizer


def leading_space() -> Tokenizer:
    """Llama's kind: byte fallback, a space put before the text and stripped again, and a token that is U+FFFD itself."""
    texts = ["<s>", "</s>", "▁", "a", "b", "▁a", "▁▁", "ab", "\n", "\N{REPLACEMENT CHARACTER}"]
    vocab = {token: index for index, token in enumerate([*texts, *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges = [("▁", "a"), ("▁", "▁"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def byte_level() -> Tokenizer:
    """GPT's kind: every token is bytes, and merged ones may begin or end inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    text = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("😀漢é字")[0][0]
    merges = [(first, second) for first, second in zip(text[1::2], text[2::2], strict=False)]
    vocab = {token: index for index, token in enumerate([*alphabet, *(first + second for first, second in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


TOKENIZERS = {"tiny": tiny(), "leading_space": leading_space(), "byte_level": byte_level()}


def random_tokens(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Text, text with tokens exchanged, or any ids at all (unused and special ones too)."""
    size = tokenizer.get_vocab_size() + 3
    text = "".join(rng.choices(WORDS, k=rng.randrange(12)))
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    if rng.random() < 0.4:
        token_ids = [token if rng.random() < 0.8 else rng.randrange(size) for token in token_ids]
    return token_ids if rng.random() < 0.7 else [rng.randrange(size) for _ in range(rng.randrange(30))]


def random_split(token_ids: list[int], rng: random.Random) -> list[list[int]]:
    """The tokens in order, in chunks of 0 to 6; at least one chunk."""
    chunks, start = [], 0
    while start < len(token_ids) or not chunks:
        end = start + rng.randrange(7)
        chunks.append(token_ids[start:end])
        start = end
    return chunks


def stream(
    tokenizer: Tokenizer, chunks: list[list[int]], stop=(), skip_special_tokens=True, stop_scope=EVERYWHERE
) -> tuple[str, int, bool]:
    """The text, the tokens kept and whether it was stopped, with what must hold at each push."""
    text_stream = TextStream(tokenizer, stop=stop, skip_special_tokens=skip_special_tokens, stop_scope=stop_scope)
    text, num_tokens, pushed = "", 0, 0
    for index, chunk in enumerate(chunks):
        delta = text_stream.push(chunk, last=index == len(chunks) - 1)
        text, pushed = text + delta.text, pushed + len(chunk)
        assert num_tokens <= delta.num_tokens <= pushed
        num_tokens = delta.num_tokens
        if delta.stopped:
            return text, num_tokens, True
    assert num_tokens == pushed
    return text, num_tokens, False


def cut(text: str, stop: list[str]) -> str:
    """Character by character: the text before the first stop string to be complete, the longest of several."""
    for end in range(1, len(text) + 1):
        ends = [len(string) for string in stop if text[:end].endswith(string)]
        if ends:
            return text[: end - max(ends)]
    return text


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_deltas_equal_the_whole(name, skip_special_tokens):
    tokenizer, rng = TOKENIZERS[name], random.Random(name)
    for _ in range(1000):
        token_ids = random_tokens(tokenizer, rng)
        whole = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        chunks = random_split(token_ids, rng)
        assert stream(tokenizer, chunks, skip_special_tokens=skip_special_tokens) == (whole, len(token_ids), False), chunks


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stop_strings_do_not_depend_on_the_split(name):
    tokenizer, rng = TOKENIZERS[name], random.Random(name)
    num_stopped = 0
    for _ in range(1000):
        token_ids = random_tokens(tokenizer, rng)
        whole = tokenizer.decode(token_ids)
        stop = ["".join(rng.choices(WORDS, k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 4))]
        if whole and rng.random() < 0.7:
            start = rng.randrange(len(whole))
            stop.append(whole[start : start + rng.randrange(1, 6)])
        at_once = stream(tokenizer, [token_ids], stop)
        assert at_once[0] == cut(whole, stop)
        assert at_once[2] == any(string in whole for string in stop)
        assert stream(tokenizer, random_split(token_ids, rng), stop) == at_once
        num_stopped += at_once[2]
        if at_once[2] and "\ufffd" not in at_once[0]:
            # The tokens kept give the text kept, and at most the rest of the last one's text.
            kept = tokenizer.decode(token_ids[: at_once[1]])
            assert kept.startswith(at_once[0])
            assert len(kept) - len(at_once[0]) <= len(tokenizer.decode(token_ids[at_once[1] - 1 : at_once[1]]))
    assert 300 < num_stopped < 1000


def ids(*tokens: str) -> list[int]:
    return [TOKENIZERS["tiny"].token_to_id(token) for token in tokens]


@pytest.mark.parametrize(
    ("tokens", "stop", "text", "num_tokens"),
    [
        (["a", "b", "c", "d"], ["cd"], "ab", 2),
        (["a", "b", "c", "d"], ["a"], "", 0),
        (["Count", "▁from", "a"], ["unt"], "Co", 1),  # the stop string begins within a token, which is kept
        (["Count", "▁from", "a"], ["nt fr"], "Cou", 1),
        (["Count", "▁from", "a"], [" from"], "Count", 1),
        (["a", "<|think|>", "b", "c"], ["b"], "a", 2),  # tokens without text before the stop string's own are kept
        (["a", "b", "<|think|>", "c"], ["bc"], "a", 1),  # and those within it are not
        (["a", "b", "c"], ["abcd", "bc"], "a", 1),
        (["a", "b", "c"], ["bc", "c"], "a", 1),  # complete at the same character: the longest
        (["a", "b", "c", "d"], ["abcd", "c"], "ab", 2),  # the first to be complete
        (["a", "<0xC3>", "<0xA9>", "<0xC3>", "<0xBC>", "b"], ["ü"], "aé", 3),  # characters of several tokens
        (["a", "<0xC3>", "<0xA9>", "b"], ["b"], "aé", 3),
        (["a", "<0xC3>", "<0xFF>", "b"], ["b"], "a\ufffd\ufffd", 3),
        (["a", "<0xC3>", "<0xFF>", "b"], ["\ufffdb"], "a\ufffd", 2),
    ],
)
def test_stop_by_hand(tokens, stop, text, num_tokens):
    for chunks in ([ids(*tokens)], [[token] for token in ids(*tokens)]):
        assert stream(TOKENIZERS["tiny"], chunks, stop) == (text, num_tokens, True)


def call_scope(*, is_open: bool = False, one_call: bool = False) -> StopScope:
    opening, closing, quote = ids("<|tool_call>", "<tool_call|>", '<|"|>')
    return StopScope(
        hidden=frozenset({opening, closing, quote}),
        opening=frozenset({opening}),
        closing=frozenset({closing}),
        is_open=is_open,
        last=(None if is_open else opening, closing) if one_call else None,
    )


OPEN, CLOSE = "<|tool_call>", "<tool_call|>"


@pytest.mark.parametrize(
    ("tokens", "is_open", "stop", "text", "num_tokens"),
    [
        (["a", OPEN, "b", CLOSE, "b"], False, ["b"], f"a{OPEN}b{CLOSE}", 4),  # not in the call, but behind it
        (["b", CLOSE, "a", "b"], True, ["b"], f"b{CLOSE}a", 3),
        (["a", OPEN, "b"], False, ["_call", ">", "<", "b"], f"a{OPEN}b", None),  # nor in the tags
        (["a", '<|"|>', "b"], False, ["ab", '"'], 'a<|"|>b', None),  # nor across one
        (["a", OPEN, "b", OPEN, "b", CLOSE, "b"], False, ["b"], f"a{OPEN}b{OPEN}b{CLOSE}", 6),
        (["b", "<0xC3>", OPEN, "a"], False, ["\ufffd"], "b", 1),  # a tag ends a character that was left open
        (["a", "b", OPEN, "c"], False, ["bc"], f"ab{OPEN}c", None),
    ],
)
def test_stop_strings_are_looked_for_in_their_scope(tokens, is_open, stop, text, num_tokens):
    scope, expected = call_scope(is_open=is_open), (text, num_tokens or len(tokens), num_tokens is not None)
    for chunks in ([ids(*tokens)], [[token] for token in ids(*tokens)]):
        assert stream(TOKENIZERS["tiny"], chunks, stop, False, scope) == expected


@pytest.mark.parametrize(
    ("tokens", "is_open", "text", "num_tokens"),
    [
        (["a", OPEN, "b", CLOSE, "c", OPEN, "d", CLOSE], False, f"a{OPEN}b{CLOSE}", 4),
        (["a", CLOSE, "b", OPEN, "c", CLOSE], False, f"a{CLOSE}b{OPEN}c{CLOSE}", 6),  # of no span
        (["b", CLOSE, "x"], True, f"b{CLOSE}", 2),
        (["b", OPEN, "c", CLOSE, "d"], True, f"b{OPEN}c{CLOSE}", 4),
        ([OPEN, "<0xC3>", CLOSE, "<0xA9>"], False, f"{OPEN}\ufffd{CLOSE}", 3),
        (["a", "x", OPEN, "b", CLOSE], False, "a", 1),  # at a stop string before it
        (["a", OPEN, "b"], False, f"a{OPEN}b", None),
        (["a", "b"], False, "ab", None),
    ],
)
def test_a_text_ends_behind_its_last_span(tokens, is_open, text, num_tokens):
    scope, expected = call_scope(is_open=is_open, one_call=True), (text, num_tokens or len(tokens), num_tokens is not None)
    for chunks in ([ids(*tokens)], [[token] for token in ids(*tokens)]):
        assert stream(TOKENIZERS["tiny"], chunks, ["x", "xx"], False, scope) == expected


def test_nothing_is_held_back_outside_the_scope():
    text_stream = TextStream(TOKENIZERS["tiny"], stop=["ab"], skip_special_tokens=False, stop_scope=call_scope())
    assert text_stream.push(ids("a")) == ("", 0, False)
    assert text_stream.push(ids(OPEN)) == (f"a{OPEN}", 2, False)  # "a" cannot be followed by "b" any more
    assert text_stream.push(ids("a")) == ("a", 3, False)
    fork = text_stream.fork()
    assert fork.push(ids(CLOSE, "a", "b")) == (CLOSE, 4, True)
    assert text_stream.push(ids("b"), last=True) == ("b", 4, False)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_scope_changes_no_text(name):
    tokenizer, rng = TOKENIZERS[name], random.Random(name)
    special = frozenset(tokenizer.get_added_tokens_decoder())
    scope = StopScope(hidden=special, opening=special, closing=frozenset(), is_open=False)
    for _ in range(500):
        token_ids = random_tokens(tokenizer, rng)
        whole = tokenizer.decode(token_ids, skip_special_tokens=False)
        chunks = random_split(token_ids, rng)
        assert stream(tokenizer, chunks, ["no such text"], False, scope) == (whole, len(token_ids), False), chunks


def test_what_is_held_back_and_until_when():
    text_stream = TextStream(TOKENIZERS["tiny"], stop=["bcd", "x"])
    assert text_stream.push(ids("a", "b")) == ("a", 1, False)  # "b" may begin "bcd"
    assert text_stream.push(ids("c")) == ("", 1, False)
    assert text_stream.push(ids("b")) == ("bc", 3, False)  # "bcb" cannot, its end may
    assert text_stream.push(ids("a", "<0xF0>", "<0x9F>")) == ("ba", 5, False)  # half a character
    assert text_stream.push(ids("<0x98>", "<0x80>")) == ("", 5, False)  # whole, but a further byte would spoil it
    assert text_stream.push(ids("<|think|>", "▁")) == ("😀 ", 11, False)
    assert text_stream.push(ids("b", "c", "<|think|>")) == ("", 11, False)
    assert text_stream.push([], last=True) == ("bc", 14, False)


def test_a_fork_goes_on_alone():
    text_stream = TextStream(TOKENIZERS["tiny"], stop=["bcd"])
    assert text_stream.push(ids("a", "b", "<0xF0>")) == ("a", 1, False)
    fork = text_stream.fork()
    assert fork.push(ids("c"), last=True) == ("b\ufffdc", 4, False)
    assert text_stream.fork().push(ids("<0x9F>", "<0x98>", "<0x80>", "c"), last=True) == ("b😀c", 7, False)
    assert text_stream.push(ids("a"), last=True) == ("b\ufffda", 4, False)


def test_long_waits_stay_linear():
    """A thousand bytes that never become characters: decoded a few times, not a thousand."""
    for name, token in (("tiny", ids("<0xF0>")[0]), ("byte_level", TOKENIZERS["byte_level"].token_to_id("ð"))):
        tokenizer, decoded = TOKENIZERS[name], []

        class Counting:
            def __getattr__(self, attribute, tokenizer=tokenizer):
                return getattr(tokenizer, attribute)

            def decode(self, token_ids, tokenizer=tokenizer, decoded=decoded, **arguments):
                decoded.append(len(token_ids))
                return tokenizer.decode(token_ids, **arguments)

        assert stream(Counting(), [[token]] * 1000)[0] == tokenizer.decode([token] * 1000)
        assert sum(decoded) < 4000


def test_nothing_may_follow_the_end():
    text_stream = TextStream(TOKENIZERS["tiny"], stop=["b"])
    assert text_stream.push(ids("a", "b", "c")).stopped
    with pytest.raises(AssertionError, match="after the last tokens or after the text has stopped"):
        text_stream.push(ids("a"))
