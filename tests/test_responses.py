"""`/v1/responses` over a stand-in for the Triton model, asked by OpenAI's own client."""

import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from openai import BadRequestError, InternalServerError, OpenAI
from openai import BaseModel as OpenAIModel
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from stand_in_model import Model
from starlette.testclient import TestClient

from backend.openai_server.app import create_app
from backend.openai_server.errors import ApiError, bad_request
from backend.openai_server.settings import OpenAISettings
from backend.openai_server.triton_model import Part

ASKED = {"model": "diffusiongemma", "input": "a"}
LOGPROBS = ["message.output_text.logprobs"]


def part(**said: Any) -> Part:
    nothing = {"text": "", "reasoning": "", "tool_calls": [], "finish_reason": None, "logprobs": None}
    return Part(
        **nothing | {"num_input_tokens": 7, "num_cached_tokens": 3, "num_output_tokens": 2, "num_reasoning_tokens": 0} | said
    )


def call(number: int) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": "f", "arguments": f'{{"x": {number}}}'}}


def entry(token: str) -> dict[str, Any]:
    own = {"token": token, "logprob": -0.5, "bytes": None if token == "\ufffd" else list(token.encode())}
    return own | {"top_logprobs": [own]}


class Answering(Model):
    """Answers with these parts, or fails with what comes instead of one."""

    def __init__(self, *parts: Part | ApiError):
        super().__init__()
        self._parts = parts

    async def generate(self, inputs: Mapping[str, Any], request_id: str) -> AsyncIterator[Part]:
        self.asked.append(inputs)
        for each in self._parts:
            if isinstance(each, ApiError):
                raise each
            yield each


@contextmanager
def connected(*parts: Part | ApiError) -> Iterator[OpenAI]:
    app = create_app(OpenAISettings(), Answering(*parts or (part(text="b", finish_reason="stop"),)))
    with TestClient(app, base_url="http://testserver", raise_server_exceptions=False) as http:
        yield OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    with connected() as client:
        yield client


# -- The same items, whole and as they come

ANSWERS = {
    "text": [part(text="Hello "), part(text="there", finish_reason="stop")],
    "thought": [part(reasoning="Hm"), part(reasoning="m", text="Well"), part(text="!", finish_reason="stop")],
    "thought without an answer": [part(reasoning="Hmm"), part(finish_reason="stop")],
    "cut off in the thought": [part(reasoning="Hmm", finish_reason="length")],
    "cut off in the text": [part(text="Hel", finish_reason="length")],
    "cut off before all": [part(finish_reason="length")],
    "nothing": [part(finish_reason="stop")],
    "call": [part(tool_calls=[call(1)], finish_reason="tool_calls")],
    "calls around text": [
        part(reasoning="Hm", text="First", tool_calls=[call(1), call(2)]),
        part(text="then", finish_reason=None),
        part(tool_calls=[call(3)], finish_reason="tool_calls"),
    ],
    "log probabilities": [
        part(reasoning="x", logprobs=[entry("x")]),
        part(text="\ufffdc", logprobs=[entry("\ufffd"), entry("c")]),
        part(logprobs=[entry("<turn|>")], finish_reason="stop"),
    ],
}
KINDS = {
    "text": ["message"],
    "thought": ["reasoning", "message"],
    "thought without an answer": ["reasoning", "message"],
    "cut off in the thought": ["reasoning"],
    "cut off in the text": ["message"],
    "cut off before all": [],
    "nothing": ["message"],
    "call": ["function_call"],
    "calls around text": ["reasoning", "message", "function_call", "function_call", "message", "function_call"],
    "log probabilities": ["reasoning", "message"],
}


def strictly(kind: Any, value: Any) -> Any:
    """`value` as OpenAI's type, which has all of it and of which nothing is missing. `store` is in no type, but in what
    OpenAI's API answers."""
    read = TypeAdapter(kind).validate_python(value)
    assert list(unknown(read)) in ([], ["store"])
    assert read.model_dump(exclude_unset=True, by_alias=True) == value
    return read


def unknown(value: Any) -> Iterator[str]:
    if isinstance(value, OpenAIModel):
        yield from value.model_extra
        value = value.__dict__
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from unknown(each)


def streamed(client: OpenAI, **asked: Any) -> list[dict[str, Any]]:
    """The data of the events, each of which has its type as its name."""
    lines = client.responses.with_raw_response.create(**ASKED | asked, stream=True).http_response.read().decode()
    events = [event.split("\n") for event in lines.removesuffix("\n\n").split("\n\n")]
    data = [json.loads(second.removeprefix("data: ")) for _, second in events]
    assert [first for first, _ in events] == [f"event: {each['type']}" for each in data]
    return data


def without_chance(response: Mapping[str, Any]) -> dict[str, Any]:
    """Without times, and with ids in the order in which they come."""
    text = json.dumps({name: value for name, value in response.items() if not name.endswith("_at")})
    ids = list(dict.fromkeys(re.findall(r"(?:resp|msg|rs|fc)_[0-9a-f]{32}", text)))
    for number, each in enumerate(ids):
        text = text.replace(each, f"{each.partition('_')[0]}_{number}")
    return json.loads(text)


def added_up(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The items that the events add up to, without what they repeat at the end."""
    items: list[dict[str, Any]] = []
    for event in events:
        index = event.get("output_index")
        match event["type"]:
            case "response.output_item.added":
                assert index == len(items)
                items.append(json.loads(json.dumps(event["item"])))
            case "response.content_part.added":
                items[index]["content"].append(dict(event["part"]))
            case "response.output_text.delta" | "response.reasoning_text.delta":
                written = items[index]["content"][event["content_index"]]
                written["text"] += event["delta"]
                if "logprobs" in event:
                    written["logprobs"] = written["logprobs"] + event["logprobs"]
            case "response.function_call_arguments.delta":
                items[index]["arguments"] += event["delta"]
            case "response.output_item.done":
                items[index]["status"] = event["item"]["status"]
    return items


def without_bytes(items: Sequence[Mapping[str, Any]]) -> Any:
    return json.loads(json.dumps(items), object_hook=lambda each: {name: each[name] for name in each if name != "bytes"})


@pytest.mark.parametrize("name", ANSWERS)
def test_streamed_equals_whole(name):
    asked = {"include": LOGPROBS} if name == "log probabilities" else {}
    with connected(*ANSWERS[name]) as client:
        reply = client.responses.with_raw_response.create(**ASKED | asked).http_response
        events = streamed(client, **asked)
        with client.responses.stream(**ASKED | asked) as stream:
            told = list(stream)
            final = stream.get_final_response() if "cut" not in name else told[-1].response
    whole = reply.json()
    assert reply.headers["x-request-id"] == whole["id"]
    response = strictly(Response, whole)
    assert [item.type for item in response.output] == KINDS[name]
    assert [strictly(ResponseStreamEvent, event).sequence_number for event in events] == list(range(len(events)))
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert without_chance(events[-1]["response"]) == without_chance(whole)
    assert added_up(events) == without_bytes(events[-1]["response"]["output"])
    assert final.output_text == response.output_text and [each.type for each in told] == [each["type"] for each in events]


def test_the_order_of_events():
    with connected(*ANSWERS["thought"][:2], part(tool_calls=[call(1)], finish_reason="tool_calls")) as client:
        events = streamed(client)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    begun, thought, called = (events[at] for at in (0, 2, 15))
    assert (begun["response"]["status"], begun["response"]["output"]) == ("in_progress", [])
    assert (thought["item"]["status"], thought["item"]["content"]) == ("in_progress", [])
    assert (called["item"]["status"], called["item"]["arguments"]) == ("in_progress", "")


@pytest.mark.parametrize(
    ("reason", "status", "details"),
    [("stop", "completed", None), ("tool_calls", "completed", None), ("length", "incomplete", {"reason": "max_output_tokens"})],
)
def test_why_it_ended(reason, status, details):
    with connected(part(text="a", num_reasoning_tokens=1), part(text="b", finish_reason=reason)) as client:
        answer = client.responses.with_raw_response.create(**ASKED).http_response.json()
    assert (answer["status"], answer["incomplete_details"], answer["error"]) == (status, details, None)
    assert answer["output"][-1]["status"] == status and (answer["completed_at"] is None) == (status != "completed")
    used = answer["usage"]
    assert [used[f"{each}_tokens"] for each in ("input", "output", "total")] == [7, 4, 11]
    assert used["output_tokens_details"] == {"reasoning_tokens": 1}
    assert used["input_tokens_details"] == {"cached_tokens": 3, "cache_write_tokens": 0}


def test_log_probabilities_are_of_all_tokens():
    with connected(*ANSWERS["log probabilities"]) as client:
        _, message = client.responses.create(**ASKED, include=LOGPROBS, top_logprobs=1).output
        asked = client.responses.create(**ASKED)
    entries = message.content[0].logprobs
    assert [each.token for each in entries] == ["x", "\ufffd", "c", "<turn|>"]
    assert [each.bytes for each in entries[:3]] == [[120], [], [99]]  # a byte of a character that does not say which it is
    assert [each.top_logprobs[0].token for each in entries] == [each.token for each in entries]
    assert asked.top_logprobs == 0


# -- What goes wrong in an answer


def test_what_fails_before_the_first_part_has_its_status():
    with connected(ApiError(503, "server: full; try again later")) as client:
        for stream in (False, True):
            with pytest.raises(InternalServerError, match="server: full") as raised:
                client.responses.create(**ASKED, stream=stream)
            assert raised.value.status_code == 503


def test_what_fails_later_is_the_last_event():
    with connected(part(reasoning="Hm"), part(text="He"), ApiError(503, "server: gone; send it again")) as client:
        events = streamed(client)
        with pytest.raises(InternalServerError, match="server: gone"):
            client.responses.create(**ASKED)
    failed = strictly(ResponseStreamEvent, events[-1])
    assert failed.type == "response.failed" and failed.sequence_number == len(events) - 1
    assert (failed.response.error.code, failed.response.error.message) == ("server_error", "server: gone; send it again")
    assert (failed.response.status, failed.response.output_text) == ("failed", "He")
    assert [item.status for item in failed.response.output] == ["completed", "incomplete"]


@pytest.mark.parametrize(
    ("asked", "line", "message"),
    [
        ({"max_output_tokens": 0}, "max_tokens: got 0", "max_output_tokens: got 0"),
        (
            {},
            "prompt: got 9000 tokens and max_tokens 256; lower max_tokens to 9, or shorten the prompt",
            "input: got 9000 tokens and max_output_tokens 256; lower max_output_tokens to 9, or shorten the prompt",
        ),
        (
            {"max_output_tokens": 2, "min_tokens": 3},
            "min_tokens: got 3, expected at most max_tokens, 2; raise that",
            "min_tokens: got 3, expected at most max_output_tokens, 2; raise that",
        ),
        (
            {"text": {"format": {"type": "json_object"}}, "min_tokens": 3},
            "min_tokens and structured_outputs: both given, but structured_outputs may end the answer sooner; remove one",
            "min_tokens and text.format: both given, but text.format may end the answer sooner; remove one",
        ),
        (
            {},
            "unknown sampling parameter 'max_tokens ' (closest: 'max_tokens'); expected max_tokens, min_tokens",
            "unknown sampling parameter 'max_tokens ' (closest: 'max_tokens'); expected max_output_tokens, min_tokens",
        ),
        ({}, "messages: the chat template refuses them", "input: the chat template refuses them"),
        ({"instructions": "a"}, "messages[0].content: no", "instructions.content: no"),
        ({"instructions": "a"}, "messages[1].content: no", "input.content: no"),
        ({}, "unknown sampling parameter 'messages'", "unknown sampling parameter 'messages'"),
        ({"text": {"format": {"type": "json_object"}}}, "structured_outputs: no", "text.format: no"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {}}}},
            "structured_outputs.json: no",
            "text.format.schema: no",
        ),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs: no", "structured_outputs: no"),
        (
            {"tools": [{"type": "function", "name": "{"}]},
            "tools[0].function.name: got '{'",
            "tools[0].name: got '{'",
        ),
        ({}, "tool_choice.allowed_tools.tools: no", "tool_choice.tools: no"),
        (
            {"input": [{"role": "user", "content": "a"}, {"type": "reasoning"}, *[{"type": "function_call"}] * 2]},
            "messages[1].tool_calls[1].function.arguments: no",
            "input[3].arguments: no",
        ),
        ({"input": [{"type": "function_call_output"}]}, "messages[0].tool_call_id: no", "input[0].call_id: no"),
        ({}, "image[0]: no", "image[0]: no"),
    ],
)
def test_what_the_model_refuses_has_the_clients_name(asked, line, message):
    if isinstance(asked.get("input"), list):
        whole = {"call_id": "c", "name": "f", "arguments": "{", "output": ""}
        asked = {"input": [each if "role" in each else each | whole for each in asked["input"]]}
    with connected(bad_request(line)) as client, pytest.raises(BadRequestError) as raised:
        client.responses.create(**ASKED | {"extra_body": asked})
    assert raised.value.body["message"] == message
    assert raised.value.code == ("context_length_exceeded" if "9000" in line else None)


# -- What is asked of the model: the same as by a chat completion

TOOL = {"name": "f", "description": "It is f.", "parameters": {"type": "object", "properties": {}}, "strict": True}
IMAGE = "data:image/png;base64,AAAA"
SCHEMA = {"name": "number", "schema": {"type": "integer"}, "strict": True}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]}
CALLS = [
    {"type": "function_call", "call_id": f"call_{each}", "name": "f", "arguments": "{}", "id": f"fc_{each}"} for each in (1, 2)
]
TOOL_CALLS = [{"id": f"call_{each}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for each in (1, 2)]
ANSWERED = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}],
}
TEXT = {"type": "text", "text": "b"}


@pytest.fixture(scope="module")
def asked_of_the_model() -> Iterator[Callable[[str, Mapping[str, Any]], dict[str, Any]]]:
    """The model's inputs for a body that is posted to a route, but for `stream`."""
    model = Answering(part(text="b", finish_reason="stop"))

    def asked(route: str, body: Mapping[str, Any]) -> dict[str, Any]:
        reply = http.post(f"/v1/{route}", json={"model": "diffusiongemma", **body})
        assert reply.status_code == 200, reply.text
        inputs = model.asked.pop()
        read = {name: json.loads(inputs[name]) for name in ("messages", "sampling_parameters")}
        return {**inputs, **read, "stream": None}

    with TestClient(create_app(OpenAISettings(), model)) as http:
        yield asked


def user(content: Any = "a") -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("response", "chat"),
    [
        ({"instructions": "Be brief."}, {"messages": [{"role": "system", "content": "Be brief."}, user()]}),
        ({"instructions": ""}, {}),
        (
            {"input": [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "b"}]}, user()]},
            {"messages": [{"role": "developer", "content": [TEXT]}, user()]},
        ),
        (
            {
                "input": [
                    user([{"type": "input_text", "text": "b"}, {"type": "input_image", "image_url": IMAGE, "detail": "low"}])
                ]
            },
            {"messages": [user([TEXT, {"type": "image_url", "image_url": {"url": IMAGE}}])]},
        ),
        (
            {"input": [user(), THOUGHT, ANSWERED, user("c")]},
            {"messages": [user(), {"role": "assistant", "reasoning_content": "Hm", "content": [TEXT]}, user("c")]},
        ),
        (
            {"input": [user(), {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "…"}, user("c")]},
            {"messages": [user(), user("c")]},
        ),
        (
            {"input": [user(), THOUGHT, {**THOUGHT, "content": [{"type": "text", "text": "m"}]}, user("c")]},
            {"messages": [user(), {"role": "assistant", "reasoning_content": "Hmm"}, user("c")]},
        ),
        (
            {"input": [user(), ANSWERED, {"role": "assistant", "content": "c"}]},
            {"messages": [user(), {"role": "assistant", "content": [TEXT]}, {"role": "assistant", "content": "c"}]},
        ),
        (
            {
                "input": [
                    *(user(), THOUGHT, ANSWERED, *CALLS),
                    {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
                    {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "b"}]},
                    *(THOUGHT, CALLS[0]),
                ]
            },
            {
                "messages": [
                    user(),
                    {"role": "assistant", "reasoning_content": "Hm", "content": [TEXT], "tool_calls": TOOL_CALLS},
                    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
                    {"role": "tool", "tool_call_id": "call_2", "content": [TEXT]},
                    {"role": "assistant", "reasoning_content": "Hm", "tool_calls": TOOL_CALLS[:1]},
                ]
            },
        ),
        (
            {"max_output_tokens": 9, "temperature": 0.5, "top_p": 0.9},
            {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9},
        ),
        ({"include": LOGPROBS, "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
        ({"top_logprobs": 0}, {"top_logprobs": 0}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
        ({"reasoning": {"effort": None, "context": "auto", "mode": "standard", "generate_summary": "auto"}}, {}),
        ({"text": {"format": {"type": "text"}, "verbosity": "medium"}}, {}),
        ({"text": {"format": None}}, {}),
        (
            {"text": {"format": {"type": "json_schema", **SCHEMA, "description": None}}},
            {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
        ),
        (
            {
                "input": [
                    {**user(), "type": None, "id": None, "status": None},
                    {
                        "type": "reasoning",
                        "id": None,
                        "summary": [],
                        "content": None,
                        "encrypted_content": None,
                        "status": None,
                    },
                    {**ANSWERED, "phase": None},
                    {**CALLS[0], "id": None, "status": "completed", "namespace": None},
                    {"type": "function_call_output", "call_id": "call_1", "output": "rain", "id": None, "status": None},
                ]
            },
            {
                "messages": [
                    user(),
                    {"role": "assistant", "content": [TEXT], "tool_calls": TOOL_CALLS[:1]},
                    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
                ]
            },
        ),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", **SCHEMA}, "verbosity": None}},
            {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
        ),
        (
            {"tools": [{"type": "function", **TOOL}], "parallel_tool_calls": False},
            {"tools": [{"type": "function", "function": TOOL}], "parallel_tool_calls": False},
        ),
        (
            {"tools": [{"type": "function", **TOOL}], "tool_choice": {"type": "function", "name": "f"}},
            {
                "tools": [{"type": "function", "function": TOOL}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            },
        ),
        (
            {
                "tools": [{"type": "function", **TOOL}],
                "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
            },
            {
                "tools": [{"type": "function", "function": TOOL}],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]},
                },
            },
        ),
        (
            {"seed": -1, "stop": "x", "max_denoising_steps": 3, "structured_outputs": {"regex": "a"}, "n": 1},
            {"seed": -1, "stop": "x", "max_denoising_steps": 3, "structured_outputs": {"regex": "a"}},
        ),
        ({"infill": ["a", 3], "chat_template_kwargs": {"x": 1}}, {"infill": ["a", 3], "chat_template_kwargs": {"x": 1}}),
        (
            {
                "metadata": {"a": "b"},
                "user": "u",
                "safety_identifier": "s",
                "prompt_cache_key": "k",
                "service_tier": "flex",
                "prompt_cache_retention": "24h",
                "max_tool_calls": 3,
                "truncation": "disabled",
                "background": False,
                "store": False,
                "include": ["reasoning.encrypted_content"],
                "tools": [],
                "tool_choice": "auto",
                "previous_response_id": None,
                "conversation": None,
                "prompt": None,
                "reasoning": None,
                "text": None,
            },
            {},
        ),
    ],
)
def test_the_model_is_asked_as_by_a_chat_completion(asked_of_the_model, response, chat):
    expected = asked_of_the_model("chat/completions", {"messages": [user()], **chat})
    assert asked_of_the_model("responses", {"input": "a", **response}) == expected


def test_as_coding_agents_ask():
    asked = {
        "model": "diffusiongemma",
        "instructions": "You are a coding agent.",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be careful."}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List the files."}]},
            *({"type": "reasoning", "summary": [], "content": None, "encrypted_content": None}, CALLS[0]),
            {"type": "function_call_output", "call_id": "call_1", "output": "a.py"},
        ],
        "tools": [{"type": "function", **TOOL, "strict": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199",
    }
    with connected(part(reasoning="Hm"), part(text="a.py", finish_reason="stop")) as client:
        *_, last = client.responses.create(**asked)
    response = last.response
    assert (last.type, response.output_text, response.reasoning.effort) == ("response.completed", "a.py", "medium")
    assert response.tools[0].model_dump(exclude_unset=True) == asked["tools"][0]


def test_a_response_says_what_was_asked_for():
    asked = {
        "instructions": "Be brief.",
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "reasoning": {"effort": "low", "summary": "auto"},
        "safety_identifier": "s",
        "temperature": 0.5,
        "text": {"format": {"type": "json_schema", **SCHEMA}, "verbosity": "medium"},
        "tool_choice": {"type": "function", "name": "f"},
        "tools": [{"type": "function", **TOOL}],
        "top_p": 0.9,
        "user": "u",
    }
    with connected() as client:
        whole = client.responses.with_raw_response.create(**ASKED | asked).http_response.json()
        plain = client.responses.with_raw_response.create(**ASKED).http_response.json()
    strictly(Response, whole)
    assert {name: whole[name] for name in asked} == asked
    assert not whole["store"] and not whole["background"] and whole["model"] == "diffusiongemma"
    defaults = {"instructions": None, "metadata": {}, "parallel_tool_calls": True, "tools": [], "tool_choice": "auto"}
    assert {name: plain[name] for name in defaults} == defaults
    assert plain["text"] == {"format": {"type": "text"}, "verbosity": "medium"}


@pytest.mark.parametrize("key", ["defer_loading", "allowed_callers", "output_schema", "async"])
def test_what_else_a_tool_says_is_not_repeated(key):
    with connected() as client:
        response = client.responses.create(**ASKED, extra_body={"tools": [{"type": "function", **TOOL, key: [5]}]})
    assert response.tools[0].model_dump(exclude_none=True) == {"type": "function", **TOOL}


# -- What is refused

MISSING = "but this server does not have it"
ITEMS = "'message' or 'function_call' or 'function_call_output' or 'reasoning'"
PARTS = "'input_text', 'output_text', 'input_image'"


def said(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"input": [user(list(parts))]}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"input": None}, "input: got nothing, expected a value; add it"),
        ({"input": 5}, "input: got 5, expected a list"),
        ({"input": [5]}, "input[0]: got 5, expected a JSON object"),
        (
            {"input": [{"role": "robot", "content": "a"}]},
            "input[0].role: got 'robot', expected 'user', 'assistant', 'system' or 'developer'",
        ),
        ({"input": [{"role": "user"}]}, "input[0].content: got nothing, expected a value; add it"),
        (
            {"input": [user(), {"type": "item_reference", "id": "a"}]},
            "input[1]: got {'type': 'item_reference', 'id': 'a'}, expected the item itself, for nothing is stored; "
            "set the client's store to false",
        ),
        ({"input": [{"type": "web_search_call", "id": "a"}]}, f"input[0].type: got 'web_search_call', expected {ITEMS}"),
        *[  # the type is at fault, whatever else the items of other types would want
            (
                {"input": [user(), {"call_id": "c", **item}, {"type": "b"}]},
                f"input[1].type: got {item['type']!r}, expected {ITEMS}",
            )
            for item in (
                {"type": "custom_tool_call_output", "output": [{"type": "input_image", "image_url": IMAGE}]},
                {"type": "shell_call_output", "output": [{"stdout": "a", "stderr": ""}]},
                {"type": "computer_call_output", "output": {"type": "computer_screenshot"}},
                {"type": "mcp_call", "name": "f", "arguments": "{}"},
            )
        ],
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id: got nothing, expected a value; add it"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}]},
            "input[0].output[0].type: got 'input_image', expected one of 'input_text', 'output_text'",
        ),
        (
            {"input": [{"type": "reasoning", "content": [{"type": "summary_text", "text": "a"}]}]},
            "input[0].content[0].type: got 'summary_text', expected one of 'reasoning_text', 'text'",
        ),
        (said({"type": "input_file", "file_id": "a"}), f"input[0].content[0].type: got 'input_file', expected one of {PARTS}"),
        (said({"type": "input_audio"}), f"input[0].content[0].type: got 'input_audio', expected one of {PARTS}"),
        (said({"type": "refusal", "refusal": "a"}), f"input[0].content[0].type: got 'refusal', expected one of {PARTS}"),
        (said({"type": "input_image", "file_id": "a"}), "input[0].content[0].image_url: got nothing, expected a value; add it"),
        (said({"type": "input_text", "text": 5}), "input[0].content[0].text: got 5, expected string"),
        *[
            ({"tools": [{"type": kind}]}, f"tools[0].type: got {kind!r}, expected 'function'")
            for kind in (
                *("web_search", "file_search", "computer", "mcp", "code_interpreter", "image_generation", "local_shell"),
                *("custom", "apply_patch"),
            )
        ],
        ({"tools": [{"type": "function"}]}, "tools[0].name: got nothing, expected a value; add it"),
        ({"tool_choice": "never"}, "tool_choice: got 'never', expected 'auto', 'none' or 'required'"),
        ({"tool_choice": "required"}, "tool_choice: given without tools; send tools, or remove it"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice.name: got nothing, expected a value; add it",
        ),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type: got 'mcp', expected one of 'function', 'allowed_tools'"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
            "tool_choice.tools[0].type: got 'mcp', expected 'function'",
        ),
        (
            {"include": ["file_search_call.results"]},
            f"include[0]: got 'file_search_call.results', expected {LOGPROBS[0]!r} or 'reasoning.encrypted_content'",
        ),
        ({"top_logprobs": 5}, "top_logprobs: got 5, expected 'message.output_text.logprobs' in include; add it"),
        (
            {"text": {"format": {"type": "xml"}}},
            "text.format.type: got 'xml', expected 'text' or 'json_schema' or 'json_object'",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "a"}}},
            "text.format.schema: got nothing, expected a value; add it",
        ),
        (
            {"text": {"format": {"type": "json_object", "schema": {}}}},
            "text.format: got the key 'schema' with type 'json_object', expected type alone; remove it",
        ),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "text.format and structured_outputs: both given, but each says what the answer is; remove one",
        ),
        ({"text": {"verbosity": "low"}}, f"text.verbosity: got 'low', {MISSING}; remove it"),
        ({"text": {"style": 1}}, "text: got the key 'style', expected some of format, verbosity; remove it"),
        ({"reasoning": {"context": "all_turns"}}, "reasoning.context: got 'all_turns', expected 'auto'"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode: got 'pro', expected 'standard'"),
        (
            {"reasoning": {"efort": "low"}},
            "reasoning: got the key 'efort', expected some of context, effort, generate_summary, mode, summary; remove it",
        ),
        (
            {"reasoning": {"effort": "low"}, "chat_template_kwargs": {"enable_thinking": False}},
            "reasoning.effort: got 'low', but chat_template_kwargs.enable_thinking is false; remove one",
        ),
        ({"store": True}, f"store: got true, {MISSING}; remove it"),
        ({"background": True}, f"background: got true, {MISSING}; remove it"),
        ({"truncation": "auto"}, f"truncation: got 'auto', {MISSING}; remove it"),
        *[
            ({name: "a"}, f"{name}: got 'a', {MISSING}; send the conversation's items in input")
            for name in ("previous_response_id", "conversation")
        ],
        ({"prompt": {"id": "a"}}, f"prompt: got {{'id': 'a'}}, {MISSING}; send its text in instructions and input"),
        ({"context_management": []}, f"context_management: got [], {MISSING}; remove it"),
        ({"audio": {}}, f"audio: got {{}}, {MISSING}; remove it"),
        *[
            ({name: 5}, f"{name}: got 5, but a response has {here}; send that")
            for name, here in (
                *(("max_tokens", "max_output_tokens"), ("max_completion_tokens", "max_output_tokens"), ("messages", "input")),
                *(("response_format", "text.format"), ("reasoning_effort", "reasoning.effort")),
                *(("verbosity", "text.verbosity"), ("logprobs", "include")),
            )
        ],
        ({"n": 2}, "n: got 2, expected 1"),
        ({"metadata": {"a": 1}}, "metadata.a: got 1, expected string"),
        ({"stream_options": {}}, "stream_options: got {} without stream; set stream to true, or remove it"),
    ],
)
def test_what_is_refused(client, asked, message):
    with pytest.raises(BadRequestError) as raised:
        client.responses.create(**ASKED | {"extra_body": asked})
    assert (raised.value.body["message"], raised.value.param) == (message, re.match(r"[\w.\[\]]+", message)[0])


def test_the_document_has_each_routes_own_types():
    with TestClient(create_app(OpenAISettings(), Model())) as http:
        document = http.get("/openapi.json").json()
    names = re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document))
    assert set(names) <= set(document["components"]["schemas"])
    body = document["paths"]["/v1/responses"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"input", "model"} == set(body["required"])
    assert all("/responses." in each for each in re.findall(r'"(#/[^"]+)"', json.dumps(body)))
