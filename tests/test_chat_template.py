"""Chats → prompts: transformers' rendering is the oracle, and everything that is wrong gets one line."""

import errno
import itertools
import json
import re
from pathlib import Path

import pytest
from small_checkpoints import TINY
from tiny_tasks import questions
from tokenizers import Tokenizer

from backend.chat.messages import chat_request
from backend.chat.template import ChatTemplate
from backend.errors import RequestError
from backend.sampling_config import SamplingConfig

TOKENIZER = Tokenizer.from_file(str(TINY / "tokenizer.json"))
USER = {"role": "user", "content": "Hello."}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
THINKING = "chat_template_kwargs.enable_thinking"
ALLOWED = "tool_choice.allowed_tools"
PRICE = {"type": "function", "function": {"name": "price"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "ulm"}'}}


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate.load(TINY, TOKENIZER)


def test_prompts_are_transformers(template, render):
    for question in itertools.islice(questions(1, held_out=True), 30):
        chat = chat_request(question.messages, question.tools, None, {"enable_thinking": question.enable_thinking})
        assert template.prompt(chat).text == render(question)


def test_several_turns(template, chat_tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "Hi.", "refusal": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "up?"}]},
    ]
    expected = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert template.prompt(chat_request(messages)).text == expected


def test_a_tool_result_gets_the_name_of_its_call(template, chat_tokenizer):
    """OpenAI's clients send arguments as text, no content, and results with an id alone; templates want none of that."""
    sent = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    plain = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "ulm"}}}]}
    expected = chat_tokenizer.apply_chat_template(
        [USER, plain, {"role": "tool", "name": "weather", "content": "rain"}], tools=[WEATHER], tokenize=False
    )
    assert template.prompt(chat_request(sent, [WEATHER])).text == expected


def test_a_call_may_say_null_for_what_it_has_not():
    def calling(**call):
        return [
            USER,
            {"role": "assistant", "tool_calls": [{"id": "c1", **call}]},
            {"role": "tool", "tool_call_id": "c1", "content": ""},
        ]

    null = calling(type=None, function={"name": "weather", "arguments": None})
    whole = calling(type="function", function={"name": "weather", "arguments": "{}"})
    assert chat_request(null) == chat_request(whole)


@pytest.mark.parametrize(
    ("tools", "choice", "prefill"),
    [
        ([WEATHER, PRICE], None, ""),
        ([WEATHER, PRICE], "auto", ""),
        ([WEATHER, PRICE], "required", "<|tool_call>call:"),
        ([WEATHER], "required", "<|tool_call>call:weather{"),
        ([WEATHER, PRICE], {"type": "function", "function": {"name": "price"}}, "<|tool_call>call:price{"),
    ],
)
def test_a_call_that_must_be_made_is_begun_in_the_prompt(template, tools, choice, prefill):
    free = template.prompt(chat_request([USER], tools)).text
    prompt = template.prompt(chat_request([USER], tools, choice))
    assert (prompt.text, prompt.form.prefill, prompt.form.with_tools) == (free + prefill, prefill, True)


def test_min_tokens_where_a_grammar_decides_when_a_call_ends(template):
    config = SamplingConfig(min_tokens=5)
    assert template.prompt(chat_request([USER], [WEATHER])).form.sampling(config).min_tokens == 5
    strict = WEATHER | {"function": WEATHER["function"] | {"strict": True}}
    for tools, choice in (([WEATHER], "required"), ([strict], None)):
        with pytest.raises(RequestError) as raised:
            template.prompt(chat_request([USER], tools, choice)).form.sampling(config)
        got = "got 5, but a call that must be made, or is of a strict tool, may end the answer sooner"
        assert str(raised.value) == f"min_tokens: {got}; remove it, or tool_choice and strict"


def test_min_tokens_where_the_first_call_ends_the_answer(template):
    config = SamplingConfig(min_tokens=5)
    for tools, choice, parallel in (([WEATHER], None, True), ([WEATHER], "none", False), ([], None, False)):
        prompt = template.prompt(chat_request([USER], tools, choice, parallel_tool_calls=parallel))
        assert prompt.form.sampling(config).min_tokens == 5
    prompt = template.prompt(chat_request([USER], [WEATHER], parallel_tool_calls=False))
    assert prompt.form.sampling(SamplingConfig()).min_tokens == 0
    with pytest.raises(RequestError) as raised:
        prompt.form.sampling(config)
    got = "got 5, but with parallel_tool_calls false the first call may end the answer sooner"
    assert str(raised.value) == f"min_tokens: {got}; remove one"


@pytest.mark.parametrize(
    ("tools", "choice", "parallel", "last"),
    [
        ([WEATHER], None, True, None),
        ([WEATHER], None, False, ("<|tool_call>", "<tool_call|>")),
        ([WEATHER], "required", False, (None, "<tool_call|>")),
        ([WEATHER], "none", False, None),
        ([], None, False, None),  # a call is text
    ],
)
def test_an_answer_that_may_have_one_call_ends_behind_it(template, tools, choice, parallel, last):
    prompt = template.prompt(chat_request([USER], tools, choice, parallel_tool_calls=parallel))
    ids = prompt.form.stop_scope.last
    assert (ids and tuple(token and TOKENIZER.id_to_token(token) for token in ids)) == last


def test_tool_choice_none_does_not_tell_of_the_tools(template):
    prompt = template.prompt(chat_request([USER], [WEATHER], "none"))
    assert prompt.text == template.prompt(chat_request([USER])).text
    assert not prompt.form.with_tools


def allowed(mode: str, *names: str) -> dict:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize(
    ("choice", "told", "prefill"),
    [
        (allowed("auto", "price"), [PRICE], ""),
        (allowed("auto", "price", "weather", "price"), [WEATHER, PRICE], ""),  # in the order of the request
        (allowed("required", "price"), [PRICE], "<|tool_call>call:price{"),
        (allowed("required", "weather", "price"), [WEATHER, PRICE], "<|tool_call>call:"),
    ],
)
def test_the_model_is_told_of_the_tools_alone_that_are_allowed(template, choice, told, prefill):
    prompt = template.prompt(chat_request([USER], [WEATHER, PRICE], choice))
    assert prompt == template.prompt(chat_request([USER], told, choice["allowed_tools"]["mode"]))
    assert prompt.text == template.prompt(chat_request([USER], told)).text + prefill


def test_a_template_that_opens_a_thought():
    template = ChatTemplate("{{ messages[0].content }}<|channel>thought\n", {}, TOKENIZER)
    prompt = template.prompt(chat_request([USER], [WEATHER]))
    assert prompt.form.in_thought
    required = template.prompt(chat_request([USER], [WEATHER], "required"))
    assert required.text == prompt.text + "<channel|><|tool_call>call:weather{"
    asked = {"role": "user", "content": "<|channel>thought\n is what?"}
    assert not ChatTemplate("{{ messages[0].content }}", {}, TOKENIZER).prompt(chat_request([asked])).form.in_thought


def test_the_template_may_be_in_tokenizer_config(tmp_path):
    config = {"chat_template": "{{ bos_token }}{{ x }}", "bos_token": {"content": "<bos>"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.load(tmp_path, TOKENIZER)
    assert template.prompt(chat_request([USER], template_kwargs={"x": "é"})).text == "<bos>é"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        pytest.param("[" * 100_000, "not valid JSON", id="nested deeply"),
        ("[1]", "got [1], expected a JSON object"),
    ],
)
def test_a_bad_tokenizer_config(tmp_path, text, message):
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json") as raised:
        ChatTemplate.load(tmp_path, TOKENIZER)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_files_that_cannot_be_read_are_named(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=rf"{name}: cannot be read \('utf-8' codec .*; give access to it, or copy it from"):
        ChatTemplate.load(tmp_path, TOKENIZER)

    def refused(self, encoding):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be read ([Errno 13] Permission denied: '{path}')")):
        ChatTemplate.load(tmp_path, TOKENIZER)


def test_without_a_template(tmp_path):
    with pytest.raises(RequestError, match="messages: this engine has no chat template; send text_input or input_ids"):
        ChatTemplate.load(tmp_path, TOKENIZER).prompt(chat_request([USER]))


@pytest.mark.parametrize(
    ("template", "kwargs", "message"),
    [
        ("{{ raise_exception('no\nthanks') }}", {}, "messages: the chat template refuses them: no thanks"),
        ("{{ messages[0].nothing.more }}", {}, "messages: the chat template refuses them: 'dict object' has no attribute"),
        ("{{ x + 1 }}", {"x": "a"}, "messages: the chat template refuses them: can only concatenate str"),
        ("{{ x }}", {"tools": 1, "messages": 2}, "chat_template_kwargs: got messages, tools, which the server sets"),
        ("{{ x }}{{ a }}", {"a": 1, "y": 2}, "chat_template_kwargs: got 'y', expected variables of the chat template: a, x"),
        ("{% set x = 1 %}{{ x }}{{ messages }}", {"x": 2}, "got 'x', expected variables of the chat template: none"),
        ("{% for x in tools %}{{ x }}{% endfor %}", {"x": 2}, "got 'x', expected variables of the chat template: none"),
        ("{{ strftime_now('%Y') }}", {"strftime_now": 2}, "got 'strftime_now', expected variables of the chat template: none"),
        ("{% generation %}{{ x }}{% endgeneration %}", {"y": 2}, "got 'y', expected variables of the chat template: x"),
        ("{{ x / 0 }}", {"x": 1}, "messages: the chat template refuses them: division by zero"),
        ("{{ range(x) }}", {"x": 10**9}, "messages: the chat template refuses them: Range too big."),
        ("{{ x", {"x": 2}, "messages: the chat template refuses them: unexpected end of template"),
    ],
)
def test_what_the_template_refuses(template, kwargs, message):
    with pytest.raises(RequestError) as raised:
        ChatTemplate(template, {}, TOKENIZER).prompt(chat_request([USER], template_kwargs=kwargs))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_misspelled_variable_of_the_template_is_refused(template):
    """Nothing would think, and nobody be told."""
    assert "<|think|>" in template.prompt(chat_request([USER], template_kwargs={"enable_thinking": True})).text
    with pytest.raises(RequestError) as raised:
        template.prompt(chat_request([USER], template_kwargs={"enable_thinkin": True}))
    assert str(raised.value).endswith("got 'enable_thinkin', expected variables of the chat template: enable_thinking")


def test_names_of_the_tokenizer_may_be_replaced():
    template = ChatTemplate("{{ bos_token }}{{ x }}", {"bos_token": "<bos>"}, TOKENIZER)
    assert template.prompt(chat_request([USER], template_kwargs={"bos_token": "", "x": "a"})).text == "a"
    with pytest.raises(RequestError, match=r"expected variables of the chat template: x$"):
        template.prompt(chat_request([USER], template_kwargs={"y": 1}))


def assistant(**fields) -> list[dict]:
    return [USER, {"role": "assistant", **fields}]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((None,), "messages: got a value of type NoneType, expected a list of messages"),
        (("hello",), "messages: got a value of type str, expected a list of messages"),
        (([],), "messages: got an empty list, expected at least one message"),
        (([1],), "messages[0]: got 1, expected a JSON object"),
        (
            ([{"role": "robot", "content": "a"}],),
            "messages[0].role: got 'robot', expected one of 'system', 'developer', 'user'",
        ),
        (([{"content": "a"}],), "messages[0].role: got nothing, expected a value; add it"),
        (([USER, {"role": "user"}],), "messages[1].content: got nothing, expected a value; add it"),
        (
            ([{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}],),
            "messages[0].content[0].image_url: got 'a.png', expected a JSON object",
        ),
        (([USER], None, None, {"enable_thinking": "false"}), f"{THINKING}: got 'false', expected true or false"),
        (([USER], None, None, {"enable_thinking": None}), f"{THINKING}: got null, expected true or false"),
        (([{"role": "user", "content": True}],), "messages[0].content: got true, expected string"),
        (([{"role": "user", "content": 5}],), "messages[0].content: got 5, expected string"),
        (
            ([{"role": "user", "content": [{"type": "audio"}]}],),
            "messages[0].content[0].type: got 'audio', expected one of 'text'",
        ),
        (([{"role": "user", "content": [{"type": "text"}]}],), "messages[0].content[0].text: got nothing"),
        ((assistant(tool_calls=[{"function": {"arguments": ""}}]),), "messages[1].tool_calls[0].function.name: got nothing"),
        (
            (assistant(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]),),
            "messages[1].tool_calls[0].function.arguments: got '[1]', expected the text of a JSON object",
        ),
        (
            (assistant(tool_calls=[{"function": {"name": "f", "arguments": '{"a": NaN}'}}]),),
            "messages[1].tool_calls[0].function.arguments: got NaN, which is not a JSON number: '{\"a\": NaN}'; expected",
        ),
        (
            (assistant(tool_calls=[{"function": {"name": "f", "arguments": r'{"a": "\ud800"}'}}]),),
            "messages[1].tool_calls[0].function.arguments: got half of a surrogate pair, which is no character",
        ),
        (([USER, {"role": "tool", "content": "a"}],), "messages[1].tool_call_id: got null, expected the id of a tool call"),
        (
            ([*assistant(tool_calls=[CALL]), {"role": "tool", "tool_call_id": "c2", "content": "a"}],),
            "messages[2].tool_call_id: got 'c2', expected the id of a tool call in an earlier assistant message",
        ),
        (  # a key that is called as the part's type
            ([{"role": "user", "content": [{"type": "text", "text": {"text": "a"}}]}],),
            "messages[0].content[0].text: got {'text': 'a'}, expected string",
        ),
        (([USER], 5), "tools: got 5, expected a list"),
        (([USER], [{"type": "function"}]), "tools[0].function: got nothing"),
        (([USER], [{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name: got 'a b', expected string"),
        (([USER], [WEATHER, WEATHER]), "tools[1].function.name: got 'weather' again, expected another name than those before"),
        (([USER], [WEATHER], "maybe"), "tool_choice: got 'maybe', expected 'auto', 'none' or 'required'"),
        (
            ([USER], [WEATHER], {"type": "custom", "custom": {"name": "weather"}}),
            "tool_choice.type: got 'custom', expected one of 'function', 'allowed_tools'",
        ),
        (([USER], [WEATHER], allowed("none", "weather")), f"{ALLOWED}.mode: got 'none', expected 'auto' or 'required'"),
        (([USER], [WEATHER], allowed("auto")), f"{ALLOWED}.tools: got an empty list, expected some of tools, ['weather']"),
        (
            ([USER], [WEATHER], allowed("auto", "price", "weather", "time")),
            f"{ALLOWED}.tools: got the functions ['price', 'time'], expected some of tools, ['weather']",
        ),
        (([USER], None, allowed("auto", "price")), f"{ALLOWED}.tools: got the functions ['price'], expected some of tools, []"),
        (  # as the Responses API has it
            ([USER], [WEATHER], {"type": "allowed_tools", **allowed("auto", "weather")["allowed_tools"]}),
            f"{ALLOWED}: got nothing, expected a value; add it",
        ),
        (
            ([USER], [WEATHER], {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function"}]}}),
            f"{ALLOWED}.tools[0].function: got nothing, expected a value; add it",
        ),
        (([USER], [WEATHER], {"type": "function", "name": "weather"}), "tool_choice.function: got nothing, expected a value"),
        (([USER], None, "required"), "tool_choice: got 'required' without tools, expected at least one; send tools"),
        (
            ([USER], [WEATHER], {"type": "function", "function": {"name": "price"}}),
            "tool_choice: got the function 'price', expected one of tools, ['weather']",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(parts, message):
    with pytest.raises(RequestError) as raised:
        chat_request(*parts)
    assert raised.value.code == "INVALID_ARGUMENT"
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
