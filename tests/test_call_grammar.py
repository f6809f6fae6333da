"""Calls that must be made: the grammar of each tool's schema, and answers held to it."""

import json

import pytest
from small_checkpoints import TINY
from test_sampling_config import DEFAULTS
from tokenizers import Tokenizer

from backend import LLM, SamplingConfig
from backend.answer_grammar import Grammars
from backend.chat.call_grammar import call_grammar
from backend.chat.tools import TOOL_TAGS, parse_call

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "Days": {"type": "integer"},
        "unit": {"enum": ["C", "F", None, 'a"b\\c\né']},
        "tags": {"type": "array", "items": {"type": "string"}},
        "at": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "y z": {"type": ["number", "null"]}},
            "required": ["x"],
        },
        "odd:key": {"anyOf": [{"type": "boolean"}, {"const": 5}]},
    },
    "required": ["city", "unit"],
}


def tool(name: str, parameters: object = None) -> dict:
    return {"type": "function", "function": {"name": name} | ({"parameters": parameters} if parameters is not None else {})}


TOOLS = [tool("weather", WEATHER), tool("now"), tool("nothing", {"type": "object", "properties": {}})]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


def kept_of(tokenizer: Tokenizer, text: str, *, begun: str, tools=TOOLS) -> tuple[str, bool]:
    """What the grammar accepts of a text, and whether the answer may end there."""
    config = SamplingConfig(structured_outputs=call_grammar(tools, set(TOOL_TAGS), begun=begun)).resolve(DEFAULTS)
    grammar = Grammars(tokenizer, tokenizer.get_vocab_size()).answer(config)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    count = grammar._matcher.try_consume_tokens(ids)
    return tokenizer.decode(ids[:count], skip_special_tokens=False), grammar._matcher.is_accepting()


RIGHT = [
    'city:<|"|>ulm<|"|>,unit:<|"|>C<|"|>}<tool_call|>',
    'city:<|"|>ulm<|"|>,unit:<|"|>a"b\\c\né<|"|>}<tool_call|>',
    'at:{x:1.5,y z:null},city:<|"|><|"|>,Days:-3,<|"|>odd:key<|"|>:5,tags:[<|"|>a<|"|>,<|"|>b,}<|"|>],unit:null}<tool_call|>',
    'at:{x:2e3},city:<|"|>{ulm}<|"|>,<|"|>odd:key<|"|>:true,tags:[],unit:null}<tool_call|>',
    'city:<|"|>ulm<|"|>,unit:null}<tool_call|><|tool_call>call:now{a:{b:[1,{}]},<|"|>c d<|"|>:false}<tool_call|>',
]


@pytest.mark.parametrize("text", RIGHT)
def test_calls_that_fit_the_schema(text, tokenizer):
    """Each of them is read as a call."""
    assert kept_of(tokenizer, text, begun="weather") == (text, True)
    call = parse_call("call:weather{" + text.partition("<tool_call|>")[0])
    assert {"city", "unit"} <= set(json.loads(call.arguments)) <= set(WEATHER["properties"])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('city:<|"|>ulm<|"|>}', 'city:<|"|>ulm<|"|>'),  # without unit
        ('unit:<|"|>C<|"|>', ""),  # before city
        ('city:<|"|>ulm<|"|>,city:', 'city:<|"|>ulm<|"|>,'),
        ("city:3", "city:"),
        ('city:<|"|>a<|"|>,Days:3.5', 'city:<|"|>a<|"|>,Days:3'),
        ('city:<|"|>a<|"|>,unit:<|"|>K<|"|>', 'city:<|"|>a<|"|>,unit:<|"|>'),
        ("at:{y z:1", "at:{"),
        ("height:3", ""),
    ],
)
def test_what_does_not_fit_is_cut_off(text, kept, tokenizer):
    assert kept_of(tokenizer, text, begun="weather") == (kept, False)


@pytest.mark.parametrize(
    ("text", "kept"), [("now{}<tool_call|>", "now{}<tool_call|>"), ("nothing{a:1}", "nothing{a:1}"), ("later{", "")]
)
def test_the_name_is_that_of_a_tool(text, kept, tokenizer):
    assert kept_of(tokenizer, text, begun="")[0] == kept


@pytest.mark.parametrize(
    "parameters",
    [
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/b"}, "c": True, "d": {"type": "unheard of"}, "e": {"type": []}},
        },
        {"properties": {"a": {"enum": []}, "b": {"anyOf": []}, "c": {"enum": [{"x": 1}, [2]]}, "d": {"items": 3}}},
        {"properties": [], "required": "city"},
        "anything",
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_a_schema_says_otherwise_lets_any_value_through(parameters, tokenizer):
    text = "a:{x:[1,null]}}<tool_call|>"
    assert kept_of(tokenizer, text, begun="f", tools=[tool("f", parameters)]) == (text, True)


def test_a_schema_without_end_or_measure(tokenizer):
    """Deep ones are held to a depth, large ones to the form of a call."""
    deep = {"type": "string"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    text = "a:{" * 60 + "}" * 61 + "<tool_call|>"
    assert kept_of(tokenizer, text, begun="f", tools=[tool("f", deep)]) == (text, True)
    many = {"type": "object", "properties": {"a": {"enum": [str(number) for number in range(3000)] + ["", 7]}}}
    for text in ('a:<|"|>2999<|"|>}<tool_call|>', 'a:<|"|><|"|>}<tool_call|>', "a:7}<tool_call|>"):
        assert kept_of(tokenizer, text, begun="f", tools=[tool("f", many)]) == (text, True)
    assert kept_of(tokenizer, 'a:<|"|>3000', begun="f", tools=[tool("f", many)]) == ('a:<|"|>300', False)
    large = {"type": "object", "properties": {f"property {number}": {"type": "string"} for number in range(3000)}}
    assert kept_of(tokenizer, "other:1}<tool_call|>", begun="f", tools=[tool("f", large)])[1]


def test_tags_that_are_no_tokens_have_no_grammar():
    assert call_grammar(TOOLS, set(), begun="now") is None


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "price"}}], ids=["any", "named"])
def test_a_model_that_knows_no_tools_makes_a_right_call(choice, engine_dir):
    """Every one is a call of a tool that there is, with arguments of its schema."""
    llm = LLM(engine_dir, max_sequences=4)
    price = {"item": {"enum": ["ulm", "elm"]}, "count": {"type": "integer"}}
    tools = [
        tool("weather", {"type": "object", "properties": {"city": {"enum": ["ulm"]}}, "required": ["city"]}),
        tool("price", {"type": "object", "properties": price, "required": ["item"]}),
    ]
    chats = [[{"role": "user", "content": text}] for text in ("What is the weather in ulm?", "What is 17 + 25?", "Sing!")]
    for answer in llm.chat(chats, SamplingConfig(seed=1, max_tokens=200), tools=tools, tool_choice=choice):
        assert (answer.text, answer.finish_reason) == ("", "tool_calls")
        for call in answer.tool_calls:
            arguments = json.loads(call.arguments)
            if call.name == "weather":
                assert choice == "required" and arguments == {"city": "ulm"}
            else:
                assert call.name == "price" and arguments.pop("item") in ("ulm", "elm")
                assert not arguments or (isinstance(arguments.pop("count"), int) and not arguments)


def test_a_right_call_costs_no_step(engine_dir):
    llm = LLM(engine_dir, max_sequences=1)
    tools = [tool("weather", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]})]
    chat = [{"role": "user", "content": "What is the weather in ulm?"}]
    [answer] = llm.chat(chat, SamplingConfig(seed=1), tools=tools, tool_choice="required")
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("weather", '{"city": "ulm"}')]
    [given] = llm.chat(chat, SamplingConfig(seed=1, infill=["city:"]), tools=tools, tool_choice="required")
    assert given.tool_calls == answer.tool_calls
    assert len(answer.num_steps) == len(given.num_steps) == 1
