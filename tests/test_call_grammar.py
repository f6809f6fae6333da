"""Calls that must be made: the grammar of each tool's schema, and answers held to it."""

import itertools
import json
from dataclasses import replace

import pytest
from small_checkpoints import TINY
from test_sampling_config import DEFAULTS
from tiny_tasks import questions
from tokenizers import Tokenizer

from backend import LLM, SamplingConfig
from backend.answer_grammar import Grammars
from backend.chat.answer_place import rules_before_answer, thought_before
from backend.chat.call_grammar import call_grammar, strict_calls_grammar
from backend.chat.reasoning import REASONING_TAGS
from backend.chat.tools import TOOL_TAGS, parse_call
from backend.grammar import MAX_GRAMMAR_LENGTH, Grammar

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
    """What the grammar of calls accepts of a text, and whether the answer may end there."""
    return accepted(tokenizer, text, call_grammar(tools, set(TOOL_TAGS), begun=begun))


def accepted(tokenizer: Tokenizer, text: str, grammar: Grammar) -> tuple[str, bool]:
    config = SamplingConfig(structured_outputs=grammar).resolve(DEFAULTS)
    matcher = Grammars(tokenizer, tokenizer.get_vocab_size()).answer(config)._matcher
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    count = matcher.try_consume_tokens(ids)
    return tokenizer.decode(ids[:count], skip_special_tokens=False), matcher.is_accepting()


RIGHT = [
    'city:<|"|>ulm<|"|>,unit:<|"|>C<|"|>}<tool_call|>',
    'city:<|"|>ulm<|"|>,unit:<|"|>a"b\\c\né<|"|>}<tool_call|>',
    'at:{x:1.5,y z:null},city:<|"|><|"|>,Days:-3,<|"|>odd:key<|"|>:5,tags:[<|"|>a<|"|>,<|"|>b,}<|"|>],unit:null}<tool_call|>',
    'at:{x:2e3},city:<|"|>{ulm}<|"|>,<|"|>odd:key<|"|>:true,tags:[],unit:null}<tool_call|>',
    'city:<|"|>ulm<|"|>,unit:null}<tool_call|><|tool_call>call:weather{city:<|"|>elm<|"|>,unit:null}<tool_call|>',
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
        (f"{RIGHT[-1]}<|tool_call>call:now{{}}", f"{RIGHT[-1]}<|tool_call>call:"),
    ],
)
def test_what_does_not_fit_is_cut_off(text, kept, tokenizer):
    assert kept_of(tokenizer, text, begun="weather") == (kept, False)


@pytest.mark.parametrize(
    ("text", "kept"), [("now{}<tool_call|>", "now{}<tool_call|>"), ("nothing{a:1}", "nothing{a:1}"), ("later{", "")]
)
def test_the_name_is_that_of_a_tool(text, kept, tokenizer):
    assert kept_of(tokenizer, text, begun="")[0] == kept


UNIT = {"$defs": {"U": {"enum": ["C", "F"], "type": "string"}}}
NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/N"}}},
    "required": ["v"],
}
EITHER = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {}},
    "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
}
PAIR = {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 2, "maxItems": 2}
PARTS = [
    {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"properties": {"b": {"type": "null"}}, "required": ["b"]},
]


@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        ({"properties": {"u": {"$ref": "#/$defs/U"}}, "required": ["u"]} | UNIT, 'u:<|"|>C<|"|>', "u:7"),
        ({"properties": {"u": {"allOf": [{"$ref": "#/$defs/U"}], "title": "Unit"}}} | UNIT, 'u:<|"|>F<|"|>', "u:7"),
        (
            {"properties": {"n": {"$ref": "#/$defs/N"}}, "$defs": {"N": NODE}},
            "n:{kids:[{kids:[],v:2}],v:3}",
            "n:{kids:[{kids:[]}",
        ),
        ({"$ref": "#/definitions/A", "definitions": {"A": {"properties": {"c": {}}, "required": ["c"]}}}, "c:1", "z:7"),
        ({"type": "object", "properties": {}, "additionalProperties": False, "required": []}, "", "x:1"),
        ({"additionalProperties": {"type": "integer"}}, "a:1,b:2", "a:null"),
        ({"properties": {"o": EITHER}}, "o:{b:1}", "o:7"),
        ({"properties": {"o": EITHER}}, "o:{a:1,b:1}", "o:{}"),
        ({"properties": {"o": {"type": "string", "anyOf": [{"format": "uuid"}, {}]}}}, 'o:<|"|>x<|"|>', "o:7"),
        ({"properties": {"a": {}}, "required": ["a", "b"]}, "a:1,b:2", "a:1}"),
        ({"allOf": PARTS}, "a:1,b:null", "a:1,b:2"),
        ({"properties": {"a": {"enum": [{"x": 1, "y": [True]}, 5]}}}, "a:{x:1,y:[true]}", "a:6"),
        ({"properties": {"a": {"const": "\x7f😀"}}}, 'a:<|"|>\x7f😀<|"|>', "a:1"),
        ({"properties": {"a": {"enum": list(range(5000))}}}, "a:4999", "a:5000"),
        ({"properties": {"a": PAIR}}, 'a:[1,<|"|>x<|"|>]', "a:[1]"),
        ({"properties": {"a": {"type": "array", "items": False}}}, "a:[]", "a:[1]"),
        ({"properties": {"a": {"type": ["integer", "integer", "null"]}}}, "a:null", "a:true"),
        ({"properties": {"a": {"type": ["object", "null"], "properties": {"b": {}}}}}, "a:null", "a:{c:1}"),
        ({"properties": {"a": {"properties": {"b": {"type": "null"}}, "items": {}}}}, "a:{b:null}", "a:[]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_schemas_say(parameters, right, wrong, tokenizer):
    """A call that fits is accepted whole and read as a call; one that does not is cut off before its end."""
    text = right + "}<tool_call|>"
    assert kept_of(tokenizer, text, begun="f", tools=[tool("f", parameters)]) == (text, True)
    assert parse_call(f"call:f{{{right}}}")
    kept, may_end = kept_of(tokenizer, wrong, begun="f", tools=[tool("f", parameters)])
    assert len(kept) < len(wrong) and not may_end


@pytest.mark.parametrize(
    "parameters",
    [
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/b"}, "c": True, "d": {"type": "unheard of"}, "e": {"type": []}},
        },
        {"properties": {"a": {"$ref": "other.json#/b"}, "b": {"$ref": 7}, "c": {"allOf": 3}}},
        {"properties": {"a": {"enum": []}, "b": {"anyOf": []}, "c": {"enum": [{"x": 1}, [2]]}, "d": {"items": 3}}},
        {"properties": {"a": {"$ref": "#/properties/a"}}},
        {"$ref": "#"},
        {"properties": [], "required": "city"},
        "anything",
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_a_schema_says_otherwise_lets_any_value_through(parameters, tokenizer):
    text = "a:{x:[1,null]}}<tool_call|>"
    assert kept_of(tokenizer, text, begun="f", tools=[tool("f", parameters)]) == (text, True)


def nested(times: int, around) -> dict:
    schema = {}
    for _ in range(times):
        schema = around(schema)
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        nested(31, lambda inner: {"type": ["object"] * 100, "properties": {"a": inner}}),
        nested(31, lambda inner: {"properties": {"a": inner}, "anyOf": [{"required": [str(each)]} for each in range(9)]}),
        {"allOf": [{"$ref": "#"}] * 9},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"allOf": [{"$ref": "#/$defs/a"}] * 9}]}}, "$ref": "#/$defs/a"},
    ],
    ids=["types", "alternatives", "parts", "references"],
)
def test_schemas_that_unfold_without_end_are_given_up(schema):
    """Work that multiplies with every level; done to the end it would take longer than anybody waits."""
    grammar = call_grammar([tool("f", schema)], set(TOOL_TAGS), begun="f")
    assert len(grammar.answer) < 2 * MAX_GRAMMAR_LENGTH
    many = [tool(f"f{number}", schema) for number in range(1000)]
    assert len(call_grammar([*many, tool("g")], set(TOOL_TAGS), begun="").answer) < 2 * MAX_GRAMMAR_LENGTH


def test_of_many_tools_the_largest_schemas_are_left_out(tokenizer):
    def large(number: int) -> dict:
        properties = {f"property {each} of {number}": {"type": "string"} for each in range(12)}
        return tool(f"tool{number}", {"type": "object", "properties": properties, "additionalProperties": False})

    small = tool("weather", {"properties": {"city": {"enum": ["ulm"]}}, "additionalProperties": False})
    tools = [small, *(large(number) for number in range(127))]
    assert kept_of(tokenizer, "weather{city:7", begun="", tools=tools)[0] == "weather{city:"
    assert kept_of(tokenizer, "city:7", begun="weather", tools=tools)[0] == "city:"
    given_up = [
        number for number in range(127) if kept_of(tokenizer, f"tool{number}{{x:1", begun="", tools=tools)[0].endswith("1")
    ]
    assert 0 < len(given_up) < 127


def test_a_text_has_no_tags_spelled_in_letters(tokenizer):
    """Who reads the call would take them for tags, and what stands between for arguments."""
    parameters = {"properties": {"a": {"type": "string"}}, "additionalProperties": False}
    config = SamplingConfig(structured_outputs=call_grammar([tool("f", parameters)], set(TOOL_TAGS), begun="f"))
    for spelled, fits in (('x<|"|>,admin:true', False), ("<tool_call|>", False), ('x<|"|', True), ("< tool_call|>", True)):
        ids = tokenizer.encode('a:<|"|>', add_special_tokens=False).ids
        ids += [token for letter in spelled for token in tokenizer.encode(letter, add_special_tokens=False).ids]
        ids += tokenizer.encode('<|"|>}<tool_call|>', add_special_tokens=False).ids
        grammar = Grammars(tokenizer, tokenizer.get_vocab_size()).answer(config.resolve(DEFAULTS))
        assert (grammar._matcher.try_consume_tokens(ids) == len(ids)) is fits


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
    assert strict_calls_grammar([strict(tool("now"))], set(), thought="", thought_rules=[]) is None


# -- Calls that the model chooses


def strict(one: dict) -> dict:
    return one | {"function": one["function"] | {"strict": True}}


CITY = {"type": "object", "properties": {"city": {"enum": ["elm"]}}, "required": ["city"], "additionalProperties": False}


@pytest.mark.parametrize("thinks", [False, True])
def test_text_and_calls_of_strict_tools(thinks, tokenizer):
    special = {*TOOL_TAGS, *REASONING_TAGS}
    thought, rules = thought_before(special, in_thought=thinks, after_thought=False)
    tools = [strict(tool("weather", CITY)), tool("now", CITY)]
    grammar = strict_calls_grammar(tools, special, thought=thought, thought_rules=rules)

    before = "Well<channel|>" if thinks else ""
    call = '<|tool_call>call:weather{city:<|"|>elm<|"|>}<tool_call|>'
    for text in ("", "It is 42.", call, f"Well {call} and {call}", f"{call}<|tool_call>call:now{{x:1}}<tool_call|>"):
        assert accepted(tokenizer, before + text, grammar) == (before + text, True)
    for text, rest in (
        ("<|tool_call>call:weather{", "}"),
        ("<|tool_call>call:", "later{"),
        ('a<|tool_call>call:weather{city:<|"|>', "ulm"),
    ):
        assert accepted(tokenizer, before + text + rest, grammar) == (before + text, False)
    assert strict_calls_grammar([tool("now", CITY)], special, thought=thought, thought_rules=rules) is None


def test_what_stands_for_a_described_answer_is_a_call(tokenizer):
    """What is none would be read as text, and be an answer of another form."""
    rules = rules_before_answer(set(TOOL_TAGS), in_thought=False, after_thought=True, tools=["a<b-1", "now"])
    grammar = replace(SamplingConfig(structured_outputs={"regex": "[0-9]+"}).structured_outputs, before=rules)
    call = '<|tool_call>call:a<b-1{city:<|"|>ulm<|"|>,at:{x:[1.5,null]}}<tool_call|>'
    assert parse_call(call.removeprefix("<|tool_call>").removesuffix("<tool_call|>"))
    for text in ("42", call, f"{call}<|tool_call>call:now{{}}<tool_call|>"):
        assert accepted(tokenizer, text, grammar) == (text, True)
    for text, rest in (
        ("<|tool_call>", "fall:"),
        ("<|tool_call>call:", "later{"),
        ("<|tool_call>call:now{}", "}"),
        (call, "42"),
    ):
        assert accepted(tokenizer, text + rest, grammar)[0] == text


def test_a_model_calls_strict_tools_rightly_and_answers_as_before(engine_dir):
    """It knows a city of any name; right calls and texts are the same as before, in as many steps."""
    llm = LLM(engine_dir, max_sequences=2)
    config = SamplingConfig(seed=1, max_tokens=96)

    def answer(question: str, one: dict):
        [result] = llm.chat([{"role": "user", "content": question}], config, tools=[one])
        return result

    [call] = answer("What is the weather in ulm?", strict(tool("weather", CITY))).tool_calls
    assert (call.name, call.arguments) == ("weather", '{"city": "elm"}')
    asked = [each for each in itertools.islice(questions(2027, held_out=True), 60) if each.tools]
    assert {each.task for each in asked} == {"tool", "tool result"}  # a call, and a text
    for each in asked[:8]:
        held, before = (
            llm.chat(each.messages, config, tools=tools)[0] for tools in ([strict(one) for one in each.tools], each.tools)
        )
        assert (held.text, held.tool_calls, held.num_steps) == (before.text, before.tool_calls, before.num_steps)


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
