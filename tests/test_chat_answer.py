"""Reading answers: thoughts and tool calls apart, nothing lost, and the same however the text is split."""

import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_checkpoints import TINY
from tokenizers import Tokenizer

from backend.chat.answer import AnswerDelta, AnswerFormat, AnswerParser, joined, parse_answer
from backend.chat.markup import Segment, TagSet, TagSplitter
from backend.chat.reasoning import REASONING_TAGS, ThoughtTokens
from backend.chat.tools import TOOL_TAGS, ToolCall, parse_call
from backend.text_stream import TextStream

TOKENIZER = Tokenizer.from_file(str(TINY / "tokenizer.json"))
SPECIAL = [token.content for token in TOKENIZER.get_added_tokens_decoder().values() if token.special]
TAGS = TagSet({*SPECIAL, *REASONING_TAGS, *TOOL_TAGS})
# The same cases every time: a run that fails can be run again.
ANY_CASE = settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

# Text that is mostly markup, whole or torn, with characters of several bytes and of several code points.
FRAGMENTS = [
    "thought",
    "thought\n",
    "\n",
    " ",
    "call:",
    "f{",
    "a:",
    "1",
    ",",
    "}",
    "[",
    "]",
    "<",
    "<|",
    "|>",
    "<|tool",
    "é",
    "😀",
]
FRAGMENTS += ["e\N{COMBINING ACUTE ACCENT}", "👩‍👩‍👧", "text", "call:f{a:1}"]
MARKUP = st.lists(st.one_of(st.sampled_from(SPECIAL), st.sampled_from(FRAGMENTS), st.text(max_size=3))).map("".join)
FORMS = st.builds(
    AnswerFormat,
    tags=st.just(TAGS),
    in_thought=st.booleans(),
    with_tools=st.booleans(),
    keep_special_tokens=st.booleans(),
    prefill=st.sampled_from(["", "<|tool_call>call:", "<|tool_call>call:f{"]),
)


def cut(text: str, at: list[int]) -> list[str]:
    places = [0, *sorted(place % (len(text) + 1) for place in at), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(places)]


def in_pieces(pieces: list[str], form: AnswerFormat) -> AnswerDelta:
    parser = AnswerParser(form)
    return joined(parser.push(piece, last=index == len(pieces) - 1) for index, piece in enumerate(pieces))


def read(text: str, **form) -> tuple[str, str, list[tuple[str, str]]]:
    answer = parse_answer(text, AnswerFormat(tags=TAGS, **{"with_tools": True, **form}))
    return answer.text, answer.reasoning, [(call.name, call.arguments) for call in answer.tool_calls]


@ANY_CASE
@given(MARKUP, st.lists(st.integers(0, 1000), max_size=8), FORMS)
def test_the_split_does_not_matter(text, at, form):
    whole = parse_answer(text, form)
    assert in_pieces(cut(text, at), form) == whole
    assert in_pieces([*text, ""], form) == whole


@ANY_CASE
@given(MARKUP, st.lists(st.integers(0, 1000), max_size=8))
def test_segments_are_the_text(text, at):
    splitter = TagSplitter(TAGS)
    pieces = cut(text, at)
    segments = [
        segment for index, piece in enumerate(pieces) for segment in splitter.push(piece, last=index == len(pieces) - 1)
    ]
    assert "".join(segment.text for segment in segments) == text
    assert all(segment.is_tag == (segment.text in SPECIAL) and segment.text for segment in segments)


@ANY_CASE
@given(MARKUP)
def test_plain_text_comes_out_as_it_is(text):
    for tag in SPECIAL:
        text = text.replace(tag, "")
    if not any(tag in text for tag in SPECIAL):  # removing one may have made another
        assert read(text) == (text, "", [])


@pytest.mark.parametrize("end", ["<tool_call|>", ""])
def test_a_malformed_call_comes_without_special_tokens_that_are_not_its_own(end):
    call = f'<|tool_call>call:f{{a:<|"|>x<pad>y<|"|><pad>{end}'
    assert read(call) == (call.replace("<pad>", ""), "", [])
    assert read(call, keep_special_tokens=True) == (call, "", [])


@ANY_CASE
@given(MARKUP)
def test_a_call_is_a_call_or_the_text_that_it_is(body):
    if any(tag in body for tag in ("<|tool_call>", "<tool_call|>")):
        return
    text, thought, calls = read(f"before<|tool_call>{body}<tool_call|>after")
    assert thought == ""
    segments = TagSplitter(TAGS).push(body, last=True)
    kept = "".join(each.text for each in segments if not each.is_tag or each.text in TOOL_TAGS)
    assert (text, len(calls)) in ((f"before<|tool_call>{kept}<tool_call|>after", 0), ("beforeafter", 1))
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


WORDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<"), max_size=8)  # nothing like a tag
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(-1e9, 1e9).filter(lambda x: x != 0), WORDS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", "b_c", "d e"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@ANY_CASE
@given(st.dictionaries(st.sampled_from(["city", "max-price", "x1"]), VALUES, max_size=3))
def test_calls_are_read_as_the_template_writes_them(chat_tokenizer, arguments):
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    prompt = chat_tokenizer.apply_chat_template([{"role": "user", "content": "a"}, called], tokenize=False)
    [(name, text)] = read(prompt[prompt.index("<|tool_call>") :])[2]
    assert (name, json.loads(text)) == ("f", arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel>thought\nI think.<channel|>Yes.", ("Yes.", "I think.", [])),
        ("<|channel>thought\n<channel|>Yes.", ("Yes.", "", [])),  # an empty thought leaves no trace
        ("<|channel>thought\n \n<channel|>Yes.", ("Yes.", "", [])),
        ("<|channel>thought<channel|>Yes.", ("Yes.", "", [])),
        ("<|channel>\n<channel|>Yes.", ("Yes.", "", [])),
        ("<|channel>thought\n\nI think.\nSo.\n<channel|>\nYes.", ("\nYes.", "I think.\nSo.", [])),
        ("<|channel>thought\nI thi", ("", "I thi", [])),  # cut at max_tokens
        ("<|channel>thoughtful<channel|>Yes.", ("Yes.", "thoughtful", [])),  # no name, as far as one can tell
        ("<|channel>I think.<channel|>Yes.", ("Yes.", "I think.", [])),
        ("<|channel>thou<channel|>Yes.", ("Yes.", "thou", [])),
        ("<|channel>thought\nA.<channel|>B.<|channel>thought\nC.<channel|>D.", ("B.D.", "A.C.", [])),
        ("<|channel>thought\nA.<|channel>B.<channel|>C.", ("C.", "A.B.", [])),
        ("Yes.<channel|>", ("Yes.", "", [])),
        ("<|channel>thought\nA.<|tool_call>call:f{}<tool_call|>", ("", "A.", [("f", "{}")])),
        ("<|think|>A<turn|>B", ("AB", "", [])),  # other special tokens are no text
        ("a<b <|b|> |>", ("a<b <|b|> |>", "", [])),
    ],
)
def test_thoughts_by_hand(text, expected):
    assert read(text) == expected


def test_a_thought_that_the_prompt_has_opened():
    assert read("I think.\n<channel|>Yes.", in_thought=True) == ("Yes.", "I think.", [])
    assert read("thought\n", in_thought=True) == ("", "thought", [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>', ("", "", [("f", '{"a": "x"}')])),
        ("A <|tool_call>call:f{}<tool_call|> B", ("A  B", "", [("f", "{}")])),
        (
            "<|tool_call>call:f{}<tool_call|><|tool_call>call:g{}<tool_call|><|tool_response>",
            ("", "", [("f", "{}"), ("g", "{}")]),
        ),
        (
            "<|tool_call>call:f{a:1,b:-2.5e3,c:true,d:null}<tool_call|>",
            ("", "", [("f", '{"a": 1, "b": -2.5e3, "c": true, "d": null}')]),
        ),
        ('<|tool_call>call:f{a:{b:[1,<|"|>,}<|"|>],c:{}}}<tool_call|>', ("", "", [("f", '{"a": {"b": [1, ",}"], "c": {}}}')])),
        ("<|tool_call> call:f { a : [ 1 , 2 ] }\n<tool_call|>", ("", "", [("f", '{"a": [1, 2]}')])),
        ('<|tool_call>call:f{<|"|>a b:<|"|>:<|"|>"\n\\<|"|>}<tool_call|>', ("", "", [("f", r'{"a b:": "\"\n\\"}')])),
        ('<|tool_call>call:f{first name:<|"|>é😀<|"|>}<tool_call|>', ("", "", [("f", '{"first name": "é😀"}')])),
        ("<|tool_call>call:a.b/c-d{}<tool_call|>", ("", "", [("a.b/c-d", "{}")])),
        ("<|channel>thought\n<channel|><|tool_call>call:f{}<tool_call|>", ("", "", [("f", "{}")])),
        (
            '<|tool_call>call:f{a:<|"|><|channel>thought\nx<channel|><turn|><|"|>}<tool_call|>B<|channel>thought\nC',
            ("B", "C", [("f", r'{"a": "<|channel>thought\nx<channel|><turn|>"}')]),  # no thought begins in a call
        ),
    ],
)
def test_calls_by_hand(text, expected):
    assert read(text) == expected


@pytest.mark.parametrize(
    "body",
    [
        "", "f{}", "call:{}", "call:f", "call:f{", "call:f{}}", "call:f{}x", "call:f{a}", "call:f{a:}", "call:f{a:1,}",
        "call:f{a:1 b:2}", "call:f{a:Paris}", 'call:f{a:"Paris"}', 'call:f{a:<|"|>x}', "call:f{a:01}", "call:f{a:1.}",
        "call:f{a:+1}", "call:f{a:1-2}", "call:f{a:NaN}", "call:f{a:[1}", "call:f{[1]}", "call:f{a:True}",
        'call:f{"a":1}', "call:f{a:" + "9" * 301 + "}", "call:f{a:1e309}", "call:f{a:[-1e400]}",
        "call:f{a:" + "[" * 5000 + "]" * 5000 + "}",
    ],
)  # fmt: skip
def test_a_malformed_call_is_text(body):
    assert parse_call(body) is None
    text = f"A<|tool_call>{body}<tool_call|>B"
    assert read(text) == (text, "", [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A<|tool_call>call:f{a:1", "A<|tool_call>call:f{a:1"),  # cut at max_tokens
        ("<|tool_call>call:f{<|tool_call>call:f{}<tool_call|>", "<|tool_call>call:f{"),
    ],
)
def test_an_unfinished_call_is_text(text, expected):
    assert read(text)[0] == expected


def test_without_tools_a_call_is_text():
    call = '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
    assert read(call, with_tools=False) == ("call:f{a:x}", "", [])
    assert read(call, with_tools=False, keep_special_tokens=True) == (call, "", [])


def test_special_tokens_are_kept_on_request():
    assert read("<|think|>A<turn|>", keep_special_tokens=True) == ("<|think|>A<turn|>", "", [])


def test_an_answer_goes_on_from_its_prefill():
    assert read('a:<|"|>x<|"|>}<tool_call|>', prefill="<|tool_call>call:f{") == ("", "", [("f", '{"a": "x"}')])
    assert read("Sorry.", prefill="<|tool_call>call:f{") == ("<|tool_call>call:f{Sorry.", "", [])


def test_the_finish_reason_of_an_answer_with_calls():
    parser = AnswerParser(AnswerFormat(tags=TAGS, with_tools=True))
    assert parser.finish_reason("stop") == "stop"
    parser.push("<|tool_call>call:f{}<tool_call|>")
    assert [parser.finish_reason(reason) for reason in ("stop", "length", None)] == ["tool_calls", "length", None]


def test_a_preview_changes_nothing():
    parser = AnswerParser(AnswerFormat(tags=TAGS, with_tools=True))
    parser.push("<|channel>thought\nA<|tool_ca")
    assert parser.preview("ll>call:f{}<tool_call|>B") == AnswerDelta(text="B", tool_calls=(ToolCall(name="f", arguments="{}"),))
    assert parser.preview("x").reasoning == "<|tool_cax"
    assert parser.push("b<channel|>C", last=True) == AnswerDelta(reasoning="<|tool_cab", text="C")


def test_of_tags_that_begin_together_the_longest_wins():
    splitter = TagSplitter(TagSet(["<a>", "<a>b", "<"]))
    assert splitter.push("x<a>") == [Segment("x", False)]
    assert splitter.push("b<a>c<") == [Segment("<a>b", True), Segment("<a>", True), Segment("c", False)]
    assert splitter.push("", last=True) == [Segment("<", True)]


ANSWERS = [
    "😀 e\N{COMBINING ACUTE ACCENT} 👩‍👩‍👧 漢字",
    "<|channel>thought\n😀 is \N{COMBINING ACUTE ACCENT}<channel|>👩‍👩‍👧<b>",
    '<|channel>thought\n<channel|><|tool_call>call:f{a:<|"|>e\N{COMBINING ACUTE ACCENT}😀<|"|>}<tool_call|>',
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_characters_and_tags_at_canvas_edges(answer):
    """Tokens in canvases of any length, decoded as the scheduler decodes them, then read: always what the whole text is."""
    form = AnswerFormat(tags=TAGS, with_tools=True)
    token_ids = TOKENIZER.encode(answer, add_special_tokens=False).ids
    expected = parse_answer(answer, form)
    for length in range(1, len(token_ids) + 1):
        stream, parser = TextStream(TOKENIZER, skip_special_tokens=False), AnswerParser(form)
        deltas = []
        for start in range(0, len(token_ids), length):
            is_last = start + length >= len(token_ids)
            text = stream.push(token_ids[start : start + length], last=is_last).text
            deltas.append(parser.push(text, last=is_last))
        assert joined(deltas) == expected


def test_tokens_of_a_thought():
    def count(text: str, **options) -> int:
        return ThoughtTokens(TOKENIZER, **options).count(TOKENIZER.encode(text, add_special_tokens=False).ids)

    assert count("<|channel>thought\n1+2=3<channel|>3") == len("thought\n1+2=3")  # a token a character
    assert count("12<channel|>3", in_thought=True) == 2
    assert count("<|channel>12<|tool_call>call") == 2
    assert count("3") == 0
    call = "<|tool_call>call:f{<|channel>12<tool_call|><|channel>3"
    assert (count(call, with_tools=True), count(call)) == (1, 3)
    assert count("a:1}<tool_call|>", in_thought=True, with_tools=True, prefill="<channel|><|tool_call>call:f{") == 0
