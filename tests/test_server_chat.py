"""Chats through the Triton model: messages and tools in; answer, thought, calls, drafts and log probabilities out."""

import itertools
import json
import re
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from server_clients import ANY_PORTS, Refused, ask, ask_once, post
from tiny_tasks import Question, questions

from backend import LLM, SamplingConfig
from backend.chat.logprobs import described_logprobs
from backend.triton_server.launch import TritonServer


@pytest.fixture(scope="module")
def server(engine_dir) -> Iterator[TritonServer]:
    with TritonServer(engine_dir=engine_dir, **ANY_PORTS) as running:
        yield running


@pytest.fixture(scope="module")
def llm(engine_dir) -> LLM:
    return LLM(engine_dir)


def first(task: str) -> Question:
    source = questions(2026, held_out=True, tasks=("tool" if task.startswith("tool") else task,))
    return next(question for question in source if question.task == task)


def inputs(question: Question, **more) -> dict:
    """The question as the model takes it, with seed 1."""
    body = {"messages": json.dumps(question.messages), "seed": 1, **more}
    if question.tools:
        body["tools"] = json.dumps(question.tools)
    if question.enable_thinking:
        body["chat_template_kwargs"] = '{"enable_thinking": true}'
    return body


def generated(server: TritonServer, body: dict) -> dict:
    with post(server.http_url, body) as reply:
        return json.load(reply)


def events(server: TritonServer, body: dict) -> list[dict]:
    with post(server.http_url, {**body, "stream": True}, path="generate_stream") as reply:
        return [json.loads(line[len(b"data: ") :]) for line in reply if line.startswith(b"data: ")]


@pytest.mark.parametrize("task", ["sum", "count", "thought", "tool", "tool result"])
def test_a_chat_over_http_and_grpc(server, llm, task):
    question = first(task)
    [expected] = llm.chat(
        question.messages,
        SamplingConfig(seed=1),
        tools=question.tools,
        chat_template_kwargs={"enable_thinking": question.enable_thinking},
    )
    calls = [(call.name, call.arguments) for call in expected.tool_calls]
    whole = generated(server, inputs(question))
    streamed = events(server, inputs(question))
    assert whole["text_output"] == expected.text == "".join(event["text_output"] for event in streamed)
    assert whole["reasoning_output"] == expected.reasoning == "".join(event["reasoning_output"] for event in streamed)
    assert whole["output_ids"] == expected.token_ids
    assert whole["finish_reason"] == expected.finish_reason == streamed[-1]["finish_reason"]
    assert whole["num_input_tokens"] == expected.num_prompt_tokens
    for responses in ([whole], streamed):
        called = [call for response in responses for call in json.loads(response["tool_calls"])]
        assert [(call["function"]["name"], call["function"]["arguments"]) for call in called] == calls
        assert all(call["type"] == "function" and call["id"].startswith("call_") for call in called)
    over_grpc = ask_once(server.grpc_url, **inputs(question))
    assert (over_grpc.text, over_grpc.token_ids) == (expected.text, expected.token_ids)
    assert question.answer.endswith(expected.text)


def test_tokens_of_the_thought_are_counted(server, chat_tokenizer):
    whole = generated(server, inputs(first("thought")))
    thought = chat_tokenizer("thought\n" + whole["reasoning_output"], add_special_tokens=False).input_ids
    assert whole["num_reasoning_tokens"] == len(thought)
    assert generated(server, inputs(first("sum")))["num_reasoning_tokens"] == 0


def test_a_tool_choice(server):
    question = first("tool")
    [name] = [tool["function"]["name"] for tool in question.tools]
    for choice in ("required", json.dumps({"type": "function", "function": {"name": name}})):
        whole = generated(server, inputs(question, tool_choice=choice))
        assert [call["function"]["name"] for call in json.loads(whole["tool_calls"])] == [name]
    whole = generated(server, inputs(question, tool_choice="none", max_tokens=40))
    assert whole["tool_calls"] == "[]"


def test_drafts_come_between_and_add_nothing(server):
    question = first("count")
    steps = {"stability_threshold": 1, "confidence_threshold": 0, "max_denoising_steps": 30}
    body = inputs(question, sampling_parameters=json.dumps(steps))
    plain = events(server, body)
    drawn = events(server, {**body, "return_drafts": True})
    drafts = [event for event in drawn if "draft_text" in event]
    rest = [event for event in drawn if "draft_text" not in event]
    assert drafts and [event["text_output"] for event in rest] == [event["text_output"] for event in plain]
    for draft in drafts:
        assert (draft["text_output"], draft["finish_reason"]) == ("", "")
        assert 1 <= draft["num_steps"] < 30
    texts = [event["text_output"] for event in rest]
    assert all(set(draft) == {"model_name", "model_version", *DRAFT} for draft in drafts)
    assert drafts[-1]["draft_text"] == texts[drafts[-1]["canvas_index"]]
    without = events(server, {**body, "return_drafts": True, "return_finish_reason": False})
    assert any("draft_text" in event for event in without) and not any("finish_reason" in event for event in without)


DRAFT = {"text_output", "finish_reason", "draft_text", "canvas_index", "num_steps"}


def test_log_probabilities(server, llm):
    question = first("sum")
    sampling = json.dumps({"top_logprobs": 2})
    whole = generated(server, inputs(question, return_logprobs=True, sampling_parameters=sampling))
    [expected] = llm.chat(question.messages, SamplingConfig(seed=1, logprobs=True, top_logprobs=2))
    assert np.array_equal(np.float32(whole["token_logprobs"]), np.float32(expected.logprobs))
    assert np.float32(whole["cumulative_logprob"]) == np.float32(sum(expected.logprobs))
    described = json.loads(whole["logprobs"])
    tops = expected.top_logprobs
    assert described == json.loads(json.dumps(described_logprobs(llm.tokenizer, expected.token_ids, expected.logprobs, tops)))
    assert "".join(entry["token"] for entry in described) == whole["text_output"]
    assert all(bytes(entry["bytes"]).decode() == entry["token"] and len(entry["top_logprobs"]) == 2 for entry in described)
    assert "token_logprobs" not in generated(server, inputs(question))


def test_parts_of_the_answer_are_given(server, llm):
    question, infill = [{"role": "user", "content": 'Reverse "ulmer".'}], ["r", 3, "u<turn|>"]
    sampling = {"infill": infill, "logprobs": True, "top_logprobs": 2}
    [expected] = llm.chat(question, SamplingConfig(seed=1, **sampling))
    answer = ask_once(server.grpc_url, messages=json.dumps(question), seed=1, sampling_parameters=json.dumps(sampling))
    assert (answer.text, answer.token_ids) == (expected.text, expected.token_ids) == ("remlu", expected.token_ids)
    with post(server.http_url, {"messages": json.dumps(question), "sampling_parameters": json.dumps(sampling)}) as reply:
        assert json.load(reply)["text_output"] == "remlu"


def test_structured_output(server, llm):
    question, structure = [{"role": "user", "content": "Count from 3 to 30."}], {"regex": "Numbers: [0-9]{2}( [0-9]+){3}"}
    sampling = {"structured_outputs": structure, "max_tokens": 64}
    [expected] = llm.chat(question, SamplingConfig(seed=1, **sampling))
    answer = ask_once(server.grpc_url, messages=json.dumps(question), seed=1, sampling_parameters=json.dumps(sampling))
    assert (answer.text, answer.token_ids) == (expected.text, expected.token_ids)
    assert re.fullmatch(structure["regex"], answer.text)
    refused = json.dumps({"structured_outputs": {"regex": "a("}})
    with pytest.raises(Refused, match=r"\[INVALID_ARGUMENT\] structured_outputs: .*unclosed group; change the grammar$"):
        ask_once(server.grpc_url, messages=json.dumps(question), sampling_parameters=refused)


def test_how_tokens_are_described(llm):
    def entry(token: str) -> dict:
        return described_logprobs(llm.tokenizer, [llm.tokenizer.token_to_id(token)], [-0.5], None)[0]

    assert entry("▁the") == {"token": " the", "logprob": -0.5, "bytes": list(b" the"), "top_logprobs": []}
    assert entry("<0xC3>")["bytes"] == [0xC3]
    assert entry("<|channel>")["token"] == "<|channel>"


def test_the_bytes_of_tokens_are_those_of_the_text(server, render):
    body = {"text_input": render(first("sum")), "return_logprobs": True}
    sampling = {"ignore_eos": True, "max_tokens": 64, "seed": 1}
    for skipped in (True, False):
        given = json.dumps({**sampling, "skip_special_tokens": skipped})
        entries = json.loads((answer := generated(server, {**body, "sampling_parameters": given}))["logprobs"])
        assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == answer["text_output"]
        assert any(entry["token"] == "<turn|>" for entry in entries)


def test_outputs_that_a_client_does_not_want(server):
    names = ("finish_reason", "num_input_tokens", "num_output_tokens")
    answer = generated(server, inputs(first("sum"), **{f"return_{name}": False for name in names}))
    assert answer["text_output"] and not set(names) & set(answer)


def test_special_tokens_on_request(server, llm):
    question = first("sum")
    sampling = {"skip_special_tokens": False, "ignore_eos": True, "max_tokens": 32, "seed": 1}
    kept = generated(server, inputs(question, sampling_parameters=json.dumps(sampling)))
    dropped = generated(server, inputs(question, sampling_parameters=json.dumps({**sampling, "skip_special_tokens": True})))
    assert kept["output_ids"] == dropped["output_ids"]
    assert "<turn|>" in kept["text_output"] and "<turn|>" not in dropped["text_output"]


HELLO = '[{"role": "user", "content": "Hello."}]'


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": "hello"}, ["messages", "malformed JSON"]),
        ({"messages": '{"role": "user"}'}, ["messages", "a JSON list of objects"]),
        ({"messages": "[]"}, ["messages: got an empty list"]),
        ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, ["messages", "half of a surrogate pair"]),
        ({"messages": HELLO, "text_input": "a"}, ["prompt: got text_input and messages", "exactly one"]),
        ({"messages": HELLO, "exclude_input_in_output": False}, ["exclude_input_in_output", "a chat is not echoed"]),
        ({"messages": HELLO, "return_drafts": True}, ["return_drafts: got true without stream"]),
        ({"messages": HELLO, "tools": "5"}, ["tools", "a JSON list of objects"]),
        ({"messages": HELLO, "tools": '[{"type": "function"}]'}, ["tools[0].function: got nothing"]),
        ({"messages": HELLO, "tool_choice": "required"}, ["tool_choice: got 'required' without tools"]),
        ({"messages": HELLO, "chat_template_kwargs": "[]"}, ["chat_template_kwargs", "JSON object"]),
        ({"text_input": "a", "tools": "[]", "tool_choice": "auto"}, ["tools, tool_choice: given without messages"]),
    ],
)
def test_refusals(server, body, words):
    with pytest.raises(urllib.error.HTTPError) as over_http:
        post(server.http_url, body)
    message = json.load(over_http.value)["error"]
    assert over_http.value.code == 400 and "\n" not in message
    assert [word for word in words if word not in message] == []
    with pytest.raises(Refused) as over_grpc:
        ask(server.grpc_url, **body)
    assert str(over_grpc.value) == message


def test_a_chat_with_an_image_that_is_none_is_refused_by_name(server):
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, {"type": "text", "text": "What is it?"}]
    with pytest.raises(Refused, match=r"image\[0\]: got 0 bytes that are no image"):
        ask(server.grpc_url, messages=json.dumps([{"role": "user", "content": content}]))


def test_many_chats_at_once(server):
    """As many as fit and more, streamed, each with the answer that it gets alone."""
    asked = list(itertools.islice(questions(7, held_out=True, tasks=("sum", "reverse", "thought")), 20))
    alone = [generated(server, inputs(question)) for question in asked]
    with ThreadPoolExecutor(len(asked)) as threads:
        together = list(threads.map(lambda question: generated(server, inputs(question)), asked))
    assert [each["text_output"] for each in together] == [each["text_output"] for each in alone]
    assert [each["reasoning_output"] for each in together] == [each["reasoning_output"] for each in alone]
