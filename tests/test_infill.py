"""Parts of an answer that a request gives: what they may be, and the answers that come of them."""

import pytest
from test_sampling_config import DEFAULTS, refusal

from backend import LLM, SamplingConfig
from backend.infill import BLANK, MAX_LENGTH, MAX_PARTS, given_tokens

SUM = [{"role": "user", "content": "What is 17 + 25?"}]
A_PART = "expected a non-empty text, a number of free tokens or a list of token ids"
A_WIDTH = "expected an integer from 1 to 16384"
A_TOKEN = "expected an integer from 0 to 2147483647"


def codes(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_parts_become_tokens_in_their_places():
    config = SamplingConfig.from_mapping({"infill": ["ab", 2, [5, 6], 1, "c"]})
    assert config.infill == ("ab", 2, (5, 6), 1, "c")
    tokens = config.resolve(DEFAULTS, codes).infill
    assert tokens == (97, 98, BLANK, BLANK, 5, 6, BLANK, 99)
    assert [given_tokens(tokens, index, 3) for index in range(4)] == [
        [97, 98, BLANK],
        [BLANK, 5, 6],
        [BLANK, 99, BLANK],
        [BLANK] * 3,
    ]


def test_no_parts_need_no_tokenizer():
    assert SamplingConfig(infill=[2, [7]]).resolve(DEFAULTS).infill == (BLANK, BLANK, 7)
    assert SamplingConfig().resolve(DEFAULTS).infill == ()


@pytest.mark.parametrize(
    ("infill", "message"),
    [
        ("text", "infill: got 'text', expected a list of texts, numbers of free tokens and lists of token ids"),
        ({"a": 1}, "infill: got {'a': 1}, expected a list of texts, numbers of free tokens and lists of token ids"),
        ([""], f"infill[0]: got '', {A_PART}"),
        ([1, []], f"infill[1]: got [], {A_PART}"),
        ([None], f"infill[0]: got None, {A_PART}"),
        ([True], f"infill[0]: got True, {A_PART}"),
        ([1.5], f"infill[0]: got 1.5, {A_PART}"),
        ([0], f"infill[0]: got 0, {A_WIDTH}"),
        ([MAX_LENGTH + 1], f"infill[0]: got {MAX_LENGTH + 1}, {A_WIDTH}"),
        ([[5, -1]], f"infill[0]: got -1, {A_TOKEN}"),
        ([["a"]], f"infill[0]: got 'a', {A_TOKEN}"),
        ([1] * (MAX_PARTS + 1), f"infill: got {MAX_PARTS + 1} parts, expected at most {MAX_PARTS}"),
        (["a" * MAX_LENGTH, "b"], f"infill: got {MAX_LENGTH + 1} characters, expected at most {MAX_LENGTH}"),
        ([[1] * MAX_LENGTH, [2]], f"infill: got {MAX_LENGTH + 1} token ids, expected at most {MAX_LENGTH}"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_refused_parts(infill, message):
    assert refusal(SamplingConfig, infill=infill) == message
    assert refusal(SamplingConfig.from_mapping, {"infill": infill}) == message


def test_no_more_than_max_tokens():
    assert len(SamplingConfig(infill=["abc", 2], max_tokens=5).resolve(DEFAULTS, codes).infill) == 5
    assert refusal(SamplingConfig(infill=["abc", 3], max_tokens=5).resolve, DEFAULTS, codes) == (
        "infill: got 6 tokens, expected at most max_tokens, 5; raise max_tokens or shorten infill"
    )
    most = SamplingConfig(infill=[MAX_LENGTH, 1], max_tokens=2**31 - 1)
    assert refusal(most.resolve, DEFAULTS) == f"infill: got {MAX_LENGTH + 1} tokens, expected at most {MAX_LENGTH}; shorten it"


@pytest.fixture(scope="module")
def llm(engine_dir) -> LLM:
    return LLM(engine_dir, max_sequences=2)


def test_a_chat_begins_with_what_is_given(llm):
    """Over a canvas of 32 tokens; the tiny model counts on from where it looks."""
    given = " ".join(str(number) for number in range(3, 20)) + " "
    [answer] = llm.chat(
        [{"role": "user", "content": "Count from 3 to 30."}], SamplingConfig(seed=1, max_tokens=128, infill=[given])
    )
    assert answer.text == " ".join(str(number) for number in range(3, 31))
    assert len(answer.num_steps) == 3


def test_a_blank_is_read_in_one_step(llm):
    """The tokens around it are given, the end of the turn too; the distributions say how sure the model is."""
    config = SamplingConfig(seed=1, infill=[2, "<turn|>"], max_denoising_steps=1, logprobs=True, top_logprobs=2)
    [answer] = llm.chat(SUM, config)
    assert (answer.text, answer.finish_reason, answer.num_steps) == ("42", "stop", [1])
    for (best, surest), (_, other) in answer.top_logprobs:
        assert best in answer.token_ids and surest > -0.01 and other < -5


def test_a_half_of_a_character_is_refused(llm):
    assert refusal(llm.chat, SUM, SamplingConfig(infill=["\ud800"])) == (
        "infill: got U+D800, half of a surrogate pair, expected text; was its source in UTF-8?"
    )
