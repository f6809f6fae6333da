"""OpenAI's own client against the front end against a real Triton server on the tiny engine."""

import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import httpx2
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from schemathesis import GenerationMode
from server_clients import ANY_PORTS
from small_checkpoints import TINY
from tiny_tasks import Question, questions
from typer.testing import CliRunner
from waiting import wait_until

from backend.__main__ import app
from backend.openai_server.launch import FrontEnd, FrontEndError
from backend.openai_server.serve import serve
from backend.openai_server.settings import OpenAISettings, read_api_keys
from backend.triton_server.launch import MODEL_REPOSITORY, TritonServer

MODEL = "diffusiongemma"
PAGE_SIZE = 32
KEY = "a key"


@pytest.fixture(scope="module")
def triton(engine_dir, tmp_path_factory) -> Iterator[TritonServer]:
    """The tiny engine with room for the longest answers that clients ask for: no program depends on the number of positions."""
    engine = tmp_path_factory.mktemp("engines") / "tiny"
    shutil.copytree(engine_dir, engine)
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["model"]["max_position_embeddings"] = 40_000
    manifest["checkpoint"]["path"] = str(TINY)
    (engine / "manifest.json").write_text(json.dumps(manifest))
    with TritonServer(engine_dir=engine, parameters={"max_sequences": "8"}, **ANY_PORTS) as started:
        yield started


@pytest.fixture(scope="module")
def server(triton, tmp_path_factory) -> Iterator[FrontEnd]:
    settings = OpenAISettings(
        triton_urls=(triton.grpc_url,), triton_metrics_url=triton.metrics_url, port=0, api_keys=(KEY, "another")
    )
    with FrontEnd(settings, tmp_path_factory.mktemp("logs") / "openai.log") as front_end:
        yield front_end


@pytest.fixture(scope="module")
def client(server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as connected:
        yield connected


def some(task: str, count: int = 4) -> list[Question]:
    """Held-out questions of one task."""
    return list(itertools.islice(questions(2026, held_out=True, tasks=(task,)), count))


def thought_and_answer(question: Question) -> tuple[str, str]:
    thought, _, answer = question.answer.removeprefix("<|channel>thought\n").partition("<channel|>")
    return thought, answer


@pytest.mark.parametrize("task", ["sum", "reverse", "count"])
def test_a_chat_as_the_recipe_has_it(client, task):
    for question in some(task):
        completion = client.chat.completions.create(
            model=MODEL, messages=question.messages, temperature=0.7, max_tokens=512, seed=1
        )
        [choice] = completion.choices
        assert (choice.message.content, choice.finish_reason) == (question.answer, "stop")
        assert choice.message.tool_calls is None and choice.message.reasoning_content is None
        used = completion.usage
        assert used.total_tokens == used.prompt_tokens + used.completion_tokens
        assert used.completion_tokens_details.reasoning_tokens == 0


def test_thinking_as_the_recipe_has_it(client, chat_tokenizer):
    for question in some("thought"):
        completion = client.chat.completions.create(
            model=MODEL,
            messages=question.messages,
            max_tokens=32768,
            seed=1,
            extra_body={"chat_template_kwargs": {"enable_thinking": True}},
        )
        [choice] = completion.choices
        assert (choice.message.reasoning_content, choice.message.content) == thought_and_answer(question)
        thought = chat_tokenizer("thought\n" + choice.message.reasoning_content, add_special_tokens=False).input_ids
        assert completion.usage.completion_tokens_details.reasoning_tokens == len(thought)


def test_a_tool_call_makes_the_full_round(client):
    """Call, result, final answer; the result is a word that the model can only have from us."""
    for question in [each for each in some("tool", 12) if each.task == "tool"][:4]:
        asked = {"model": MODEL, "tools": question.tools, "seed": 1}
        first = client.chat.completions.create(messages=question.messages, **asked)
        [choice] = first.choices
        [call] = choice.message.tool_calls
        thing = question.answer.split('<|"|>')[1]
        parameter = question.answer.partition("{")[2].partition(":")[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert call.function.name == question.tools[0]["function"]["name"]
        assert json.loads(call.function.arguments) == {parameter: thing}
        value = "42" if call.function.name == "price" else "mist"
        messages = [
            *question.messages,
            choice.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": value},
        ]
        second = client.chat.completions.create(messages=messages, **asked)
        assert (second.choices[0].message.content, second.choices[0].finish_reason) == (f"{thing}: {value}", "stop")


NAMED = {"type": "function", "function": {"name": "weather"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}


@pytest.mark.parametrize("choice", ["required", NAMED, ALLOWED, "none"])
def test_tool_choice(client, choice):
    question = next(each for each in some("tool", 20) if each.task == "tool" and "weather" in each.answer)
    others = [{"type": "function", "function": {"name": "price"}}] if choice is ALLOWED else []  # the model is not told of it
    [answer] = client.chat.completions.create(
        model=MODEL, messages=question.messages, tools=question.tools + others, tool_choice=choice, seed=1
    ).choices
    if choice == "none":
        assert answer.message.tool_calls is None and answer.finish_reason != "tool_calls"
    else:
        assert [call.function.name for call in answer.message.tool_calls] == ["weather"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_parallel_calls_ends_with_its_first(client, stream):
    """A call that must be made, of a model that may not end its answer: others follow, up to max_tokens."""
    parameters = {"type": "object", "properties": {"city": {"enum": ["ulm"]}}, "additionalProperties": False}
    asked = {
        "model": MODEL,
        "messages": user("What is the weather in ulm?"),
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": parameters}}],
        "tool_choice": "required",
        "max_tokens": 100,
        "seed": 1,
        "extra_body": {"ignore_eos": True},
        "stream": stream,
    }
    if stream:
        asked["stream_options"] = {"include_usage": True}

    def answer(**more) -> tuple[list[tuple[str, str]], list[str], int]:
        """Its calls, why it ended, and its tokens."""
        came = client.chat.completions.create(**asked, **more)
        if stream:
            streamed = Streamed(came)
            return streamed.calls, streamed.finish_reasons, streamed.usages[0].completion_tokens
        [choice] = came.choices
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        return calls, [choice.finish_reason], came.usage.completion_tokens

    calls, reasons, num_tokens = answer()
    assert len(calls) > 1 and (reasons, num_tokens) == (["length"], 100)
    one, reasons, num_tokens = answer(parallel_tool_calls=False)
    assert (one, reasons) == (calls[:1], ["tool_calls"]) and num_tokens < 32  # of a canvas


class Streamed:
    """What the chunks of a stream add up to, for one choice."""

    def __init__(self, chunks, index: int = 0):
        self.content = self.reasoning = ""
        self.calls: list[tuple[str, str]] = []
        self.finish_reasons, self.roles, self.usages, self.logprobs = [], [], [], []
        for chunk in chunks:
            self.usages += [chunk.usage] if chunk.usage else []
            for choice in chunk.choices:
                if choice.index != index:
                    continue
                self.roles += [choice.delta.role] if choice.delta.role else []
                self.content += choice.delta.content or ""
                self.reasoning += getattr(choice.delta, "reasoning_content", None) or ""
                for call in choice.delta.tool_calls or []:
                    assert call.index == len(self.calls) and call.id
                    self.calls.append((call.function.name, call.function.arguments))
                self.logprobs += choice.logprobs.content if choice.logprobs else []
                self.finish_reasons += [choice.finish_reason] if choice.finish_reason else []


@pytest.mark.parametrize("task", ["sum", "count", "thought", "tool"])
def test_streamed_equals_unstreamed(client, task):
    for question in some(task, 3):
        asked = {
            "model": MODEL,
            "messages": question.messages,
            "seed": 7,
            "extra_body": {"chat_template_kwargs": {"enable_thinking": question.enable_thinking}},
            **({"tools": question.tools} if question.tools else {}),
        }
        whole = client.chat.completions.create(**asked)
        [choice] = whole.choices
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        streamed = Streamed(chunks)
        assert streamed.content == (choice.message.content or "")
        assert streamed.reasoning == (choice.message.reasoning_content or "")
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        assert streamed.calls == calls
        assert (streamed.roles, streamed.finish_reasons) == (["assistant"], [choice.finish_reason])
        [usage] = streamed.usages
        cached = usage.prompt_tokens_details.cached_tokens
        assert cached >= whole.usage.prompt_tokens_details.cached_tokens and usage.prompt_tokens - cached < PAGE_SIZE
        assert usage.model_copy(update={"prompt_tokens_details": whole.usage.prompt_tokens_details}) == whole.usage
        assert not chunks[-1].choices
        assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_comes_canvas_by_canvas(client):
    question = next(each for each in some("count", 20) if len(each.answer) > 64)
    chunks = client.chat.completions.create(model=MODEL, messages=question.messages, stream=True, seed=1)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(pieces) > 1 and "".join(pieces) == question.answer


def test_several_choices_have_the_seeds_that_follow(client):
    [question] = some("sum", 1)
    asked = {"model": MODEL, "messages": question.messages, "temperature": 1.8, "extra_body": {"ignore_eos": True}}
    several = client.chat.completions.create(**asked, n=3, seed=5, max_tokens=40)
    alone = [client.chat.completions.create(**asked, seed=5 + index, max_tokens=40) for index in range(3)]
    texts = [choice.message.content for choice in several.choices]
    assert texts == [each.choices[0].message.content for each in alone]
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert several.usage.completion_tokens == 120
    chunks = list(client.chat.completions.create(**asked, n=3, seed=5, max_tokens=40, stream=True))
    assert [Streamed(chunks, index).content for index in range(3)] == texts


def test_values_that_ask_for_what_another_value_asks_for(client):
    """A negative seed is its 64 bits, a temperature below 0.01 is 0, best_of n is n, and a bias may be a fraction."""
    [question] = some("sum", 1)

    def answer(**asked) -> list[str]:
        body = {"model": MODEL, "prompt": question.messages[0]["content"], "temperature": 1.8, "max_tokens": 40} | asked
        return [choice.text for choice in client.completions.create(**body, extra_body={"ignore_eos": True}).choices]

    assert answer(seed=-1) == answer(seed=2**64 - 1) != answer(seed=1)
    assert answer(seed=1, temperature=0.001) == answer(seed=1, temperature=0)
    assert answer(seed=1, n=2, best_of=2) == answer(seed=1, n=2)
    assert answer(seed=1, logit_bias={"33": 99.5}) != answer(seed=1)


def test_stop_and_max_tokens(client):
    question = next(each for each in some("count", 20) if len(each.answer) > 64)
    stop = question.answer[10:13]
    asked = {"model": MODEL, "messages": question.messages, "seed": 1}
    [stopped] = client.chat.completions.create(**asked, stop=["never said", stop]).choices
    assert (stopped.message.content, stopped.finish_reason) == (question.answer[: question.answer.index(stop)], "stop")
    for limit in ({"max_tokens": 5}, {"max_completion_tokens": 5}):
        cut = client.chat.completions.create(**asked, **limit)
        assert (cut.usage.completion_tokens, cut.choices[0].finish_reason) == (5, "length")


def test_parts_of_the_answer_are_given(client):
    completion = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": 'Reverse "ulmer".'}],
        seed=1,
        logprobs=True,
        top_logprobs=2,
        extra_body={"infill": ["r", 3, "u<turn|>"]},
    )
    [choice] = completion.choices
    assert (choice.message.content, choice.finish_reason) == ("remlu", "stop")
    first, *blanks, last = choice.logprobs.content
    assert [(each.token, each.logprob, len(each.top_logprobs)) for each in (first, last)] == [("r", 0.0, 1), ("u", 0.0, 1)]
    assert [len(each.top_logprobs) for each in blanks] == [2] * 3


def test_structured_output_with_a_pydantic_model(client):
    """As the client's helper asks for it: the schema of the model, whose values the tiny checkpoint makes up."""

    class Sum(BaseModel):
        answer: int

    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    completion = client.chat.completions.parse(model=MODEL, messages=messages, seed=1, max_tokens=128, response_format=Sum)
    [choice] = completion.choices
    assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Sum)
    plain = {"type": "json_schema", "json_schema": {"name": "number", "schema": {"type": "integer"}}}
    for asked in ({"response_format": plain}, {"extra_body": {"structured_outputs": {"regex": "[0-9]+"}}}):
        answer = client.chat.completions.create(model=MODEL, messages=messages, seed=1, **asked)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("42", "stop")
    free = client.chat.completions.create(model=MODEL, messages=messages, seed=1, response_format={"type": "text"})
    assert free.choices[0].message.content == "42"


def test_completions_take_the_prompt_as_it_is(client, render, chat_tokenizer):
    asked = [*some("sum", 2), *some("count", 1)]
    texts = [render(question) for question in asked]
    ids = [chat_tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    for prompts in (texts, ids):
        completion = client.completions.create(model=MODEL, prompt=prompts, seed=1, max_tokens=160)
        assert [choice.text for choice in completion.choices] == [question.answer for question in asked]
        assert completion.usage.prompt_tokens == sum(map(len, ids))
    one = client.completions.create(model=MODEL, prompt=ids[0], seed=1, echo=False)
    assert one.choices[0].text == asked[0].answer
    echoed = client.completions.create(model=MODEL, prompt=texts[2], seed=1, max_tokens=160, echo=True)
    assert echoed.choices[0].text == texts[2] + asked[2].answer
    chunks = list(client.completions.create(model=MODEL, prompt=texts[2], seed=1, max_tokens=160, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == asked[2].answer
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_log_probabilities(client, render):
    [question] = some("sum", 1)
    asked = {"model": MODEL, "messages": question.messages, "seed": 1, "logprobs": True, "top_logprobs": 2}
    client.chat.completions.create(**asked)  # from here on the prefix cache has the prompt: the last bits depend on it
    [choice] = client.chat.completions.create(**asked).choices
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token and entry.logprob <= 0
        own, _ = entry.top_logprobs
        assert (own.token, own.logprob) == (entry.token, entry.logprob)
    assert Streamed(client.chat.completions.create(**asked, stream=True)).logprobs == entries
    [completion] = client.completions.create(model=MODEL, prompt=render(question), seed=1, logprobs=2).choices
    assert completion.logprobs.tokens == [entry.token for entry in entries]
    assert completion.logprobs.token_logprobs == [entry.logprob for entry in entries]
    assert completion.logprobs.text_offset == list(range(len(entries)))  # a character a token here
    assert completion.logprobs.top_logprobs == [{top.token: top.logprob for top in entry.top_logprobs} for entry in entries]


def test_a_response_thinks_and_answers(client):
    [question] = some("thought", 1)
    asked = {"model": MODEL, "input": question.messages, "reasoning": {"effort": "low"}, "max_output_tokens": 512}
    response = client.responses.create(**asked, extra_body={"seed": 1})
    thought, message = response.output
    assert (thought.content[0].text, response.output_text) == thought_and_answer(question)
    assert (response.status, message.status, response.incomplete_details) == ("completed", "completed", None)
    asked = {"model": MODEL, "messages": question.messages, "reasoning_effort": "low", "max_tokens": 512, "seed": 1}
    used, chat = response.usage, client.chat.completions.create(**asked).usage
    assert (used.input_tokens, used.output_tokens) == (chat.prompt_tokens, chat.completion_tokens)
    assert used.total_tokens == chat.total_tokens
    assert used.output_tokens_details.reasoning_tokens == chat.completion_tokens_details.reasoning_tokens > 0
    conversation = [*question.messages, *response.output, *user("And?")]
    again = client.responses.create(model=MODEL, input=conversation, max_output_tokens=1)
    assert again.usage.input_tokens > used.input_tokens


def test_a_response_makes_the_full_round_with_a_tool(client):
    question = next(each for each in some("tool", 20) if each.task == "tool" and "weather" in each.answer)
    [function] = [tool["function"] for tool in question.tools]
    asked = {"model": MODEL, "tools": [{"type": "function", "strict": True, **function}], "extra_body": {"seed": 1}}
    first = client.responses.create(input=question.messages, **asked)
    [call] = first.output
    thing = question.answer.split('<|"|>')[1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": thing})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "mist"}
    second = client.responses.create(input=[*question.messages, *first.output, result], **asked)
    assert (second.output_text, second.status) == (f"{thing}: mist", "completed")


def test_a_response_streams_canvas_by_canvas(client):
    question = next(each for each in some("count", 20) if len(each.answer) > 64)
    asked = {"model": MODEL, "input": question.messages, "extra_body": {"seed": 1}}
    with client.responses.stream(**asked) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert len(pieces) > 1 and "".join(pieces) == final.output_text == question.answer
    *_, cut = client.responses.create(**asked, max_output_tokens=5, stream=True)
    assert (cut.type, cut.response.incomplete_details.reason) == ("response.incomplete", "max_output_tokens")
    assert cut.response.usage.output_tokens == 5 and question.answer.startswith(cut.response.output_text)


def test_a_response_in_the_form_of_a_pydantic_model(client):
    class Sum(BaseModel):
        answer: int

    asked = {"model": MODEL, "input": "What is 17 + 25?", "max_output_tokens": 128, "extra_body": {"seed": 1}}
    parsed = client.responses.parse(**asked, text_format=Sum).output_parsed
    assert isinstance(parsed, Sum)
    with client.responses.stream(**asked, text_format=Sum) as stream:
        assert stream.get_final_response().output_parsed == parsed


def test_a_response_has_log_probabilities(client):
    asked = {"model": MODEL, "input": "What is 17 + 25?", "extra_body": {"seed": 1}, "top_logprobs": 2}
    response = client.responses.create(**asked, include=["message.output_text.logprobs"])
    entries = response.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries) == response.output_text == "42"
    assert all(bytes(entry.bytes).decode() == entry.token and len(entry.top_logprobs) == 2 for entry in entries)


def test_models_health_and_metrics(server, client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with httpx2.Client(trust_env=False) as http:
        assert http.get(f"{server.url}/health").json() == {"status": "ready"}
        assert "nv_inference_request_success" in http.get(f"{server.url}/metrics").text


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("{bad", 400, ["body", "malformed JSON"]),
        ("[1]", 400, ["body", "[1]", "JSON object"]),
        ('{"model": "diffusiongemma", "messages": NaN}', 400, ["body", "NaN"]),
        ('{"model": "diffusiongemma", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, ["surrogate"]),
        ('{"model": "diffusiongemma", "model": "another"}', 400, ["body: got key 'model' 2 times, expected a JSON object"]),
        ({}, 400, ["messages: got nothing"]),
        ({"model": MODEL, "messages": []}, 400, ["messages", "an empty list", "at least one message"]),
        ({"model": MODEL, "messages": "hello"}, 400, ["messages: got", "hello", "expected a JSON list"]),
        ({"model": MODEL, "messages": [{"role": "robot", "content": "a"}]}, 400, ["messages[0].role", "'robot'"]),
        ({"model": "another", "messages": user("a")}, 404, ["model", "'another'", "'diffusiongemma'"]),
        ({"model": MODEL, "messages": user("a"), "temperature": -1}, 400, ["temperature", "-1"]),
        ({"model": MODEL, "messages": user("a"), "temperature": "hot"}, 400, ["temperature", "'hot'"]),
        ({"model": MODEL, "messages": user("a"), "max_tokens": 0}, 400, ["max_tokens"]),
        ({"model": MODEL, "messages": user("a"), "max_tokens": 5, "max_completion_tokens": 6}, 400, ["max_tokens"]),
        ({"model": MODEL, "messages": user("a"), "n": 0}, 400, ["n: got 0"]),
        ({"model": MODEL, "messages": user("a"), "nonsense": 1}, 400, ["nonsense"]),
        ({"model": MODEL, "messages": user("a"), "frequency_penalty": 3}, 400, ["frequency_penalty: got 3"]),
        ({"model": MODEL, "messages": user("a"), "audio": {"voice": "x", "format": "wav"}}, 400, ["audio", "does not have"]),
        ({"model": MODEL, "messages": user("a"), "tool_choice": "required"}, 400, ["tool_choice", "without tools"]),
        ({"model": MODEL, "messages": user("a" * 60_000)}, 400, ["prompt", "40000"]),
        ({"model": MODEL, "messages": user("a"), "chat_template_kwargs": {"enable_thinking": "false"}}, 400, ["'false'"]),
        ({"model": MODEL, "messages": user("a"), "chat_template_kwargs": {"messages": []}}, 400, ["chat_template_kwargs"]),
        ({"model": MODEL, "messages": user("a"), "chat_template_kwargs": {"enable_thinkin": True}}, 400, ["enable_thinking"]),
        ({"model": MODEL, "messages": user("a"), "stream": True, "temperature": -1}, 400, ["temperature"]),
    ],
)
def test_errors_are_openais(server, body, status, words):
    content = body if isinstance(body, str) else json.dumps(body)
    with httpx2.Client(trust_env=False) as http:
        reply = http.post(
            f"{server.url}/v1/chat/completions", content=content, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
        )
    error = reply.json()["error"]
    assert reply.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert [word for word in words if word not in error["message"]] == []
    assert "\n" not in error["message"] and "request id" not in error["message"]


def test_errors_of_the_routes_are_openais(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx2.Client(trust_env=False, headers=headers) as http:
        for reply, status in (
            (http.get(f"{server.url}/v1/nowhere"), 404),
            (http.get(f"{server.url}/v1/chat/completions"), 405),
            (http.get(f"{server.url}/v1/models/another"), 404),
            (http.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": [[1], "a"], "suffix": "b"}), 400),
            (http.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": []}), 400),
        ):
            assert reply.status_code == status and reply.json()["error"]["message"]


def test_a_wrong_key_opens_nothing(server):
    for sent in ("Bearer wrong", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer \u00e9", None):
        headers = {"Authorization": sent.encode()} if sent else {}
        with httpx2.Client(trust_env=False, headers=headers) as http:
            for reply in (
                http.get(f"{server.url}/v1/models"),
                http.post(f"{server.url}/v1/chat/completions", json={"model": MODEL, "messages": user("a")}),
            ):
                assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    with OpenAI(base_url=f"{server.url}/v1", api_key="another") as client:
        assert client.models.list().data
    with OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


# Under way for minutes, and so still under way when the test acts.
ENDLESS = {"model": MODEL, "prompt": "Count.", "ignore_eos": True, "confidence_threshold": 0, "max_tokens": 4000}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(server, stream):
    """Eight places, all taken by clients that go: an answer afterwards shows that they are free."""

    async def ask_and_go() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            extra = {name: ENDLESS[name] for name in ("ignore_eos", "confidence_threshold")}
            known = {name: value for name, value in ENDLESS.items() if name not in extra}
            pending = [
                asyncio.create_task(client.completions.create(**known, extra_body=extra, stream=stream)) for _ in range(8)
            ]
            if stream:
                for each in await asyncio.gather(*pending):
                    await each.close()
            else:
                await asyncio.sleep(2)
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)

    asyncio.run(ask_and_go())
    assert_a_place_is_free(server)


def test_a_client_that_leaves_a_response_frees_its_place(server):
    extra = {name: ENDLESS[name] for name in ("ignore_eos", "confidence_threshold")}
    asked = {"model": MODEL, "input": "Count.", "max_output_tokens": 4000, "extra_body": extra}

    async def ask_and_go() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            for each in await asyncio.gather(*[client.responses.create(**asked, stream=True) for _ in range(8)]):
                await each.close()

    asyncio.run(ask_and_go())
    assert_a_place_is_free(server)


def assert_a_place_is_free(server: FrontEnd) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        completion = client.completions.create(model=MODEL, prompt="Count.", max_tokens=1)
    assert completion.usage.completion_tokens == 1


def num_answered(triton: TritonServer) -> int:
    with httpx2.Client(trust_env=False) as http:
        text = http.get(triton.metrics_url).text
    return sum(int(float(each)) for each in re.findall(r'diffusiongemma_requests_total{.*outcome="success".*} (\S+)', text))


def test_requests_are_shared_by_two_servers_and_go_on_when_one_is_killed(triton, engine_dir, tmp_path):
    log = tmp_path / "openai.log"
    with TritonServer(engine_dir=engine_dir, parameters={"max_sequences": "8"}, **ANY_PORTS) as other:
        settings = OpenAISettings(triton_urls=(other.grpc_url, triton.grpc_url), port=0)
        with FrontEnd(settings, log) as front_end, OpenAI(base_url=f"{front_end.url}/v1", api_key="none") as unkeyed:
            client = unkeyed.with_options(max_retries=0)

            def sums(n: int) -> set[str]:
                asked = client.chat.completions.create(
                    model=MODEL, messages=user("What is 17 + 25?"), n=n, max_tokens=64, seed=1
                )
                return {choice.message.content for choice in asked.choices}

            assert sums(8) == {"42"}
            wait_until(lambda: num_answered(other) == 4)  # the others were the fixture's server's, which tests before use, too
            extra = {name: ENDLESS[name] for name in ("ignore_eos", "confidence_threshold")}
            asked = {"model": MODEL, "prompt": "Count.", "max_tokens": 100, "extra_body": extra}
            streams = [client.completions.create(**asked, stream=True) for _ in range(2)]  # one on each
            os.killpg(other.pid, signal.SIGKILL)
            with pytest.raises(openai.APIError, match=rf"Triton server at {other.grpc_url}: cannot be reached"):
                list(streams[0])  # it has begun to answer
            assert list(streams[1])[-1].choices[0].finish_reason == "length"
            assert sums(4) == {"42"}
            with httpx2.Client(trust_env=False) as http:
                assert http.get(f"{front_end.url}/health").status_code == 200
    assert log.read_text().count("meanwhile the others are asked first") == 1


def test_without_a_triton_server_it_says_so(tmp_path):
    settings = OpenAISettings(triton_urls=("127.0.0.1:1",), port=0, max_body_bytes=1000)
    with FrontEnd(settings, tmp_path / "openai.log") as front_end, httpx2.Client(trust_env=False) as http:
        for reply in (
            http.get(f"{front_end.url}/health"),
            http.post(f"{front_end.url}/v1/chat/completions", json={"model": MODEL, "messages": user("a")}),
        ):
            assert reply.status_code == 503
            assert "Triton server at 127.0.0.1:1" in reply.json()["error"]["message"]
        assert http.get(f"{front_end.url}/metrics").status_code == 404
        assert http.post(f"{front_end.url}/v1/completions", content=" " * 1001).status_code == 413


def test_a_stop_does_not_wait_for_idle_connections():
    command = [sys.executable, "-m", "backend", "openai", "--triton", "127.0.0.1:1", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, cwd=MODEL_REPOSITORY.parent) as process, httpx2.Client(trust_env=False) as http:
        url = process.stdout.readline().split()[3]
        assert "connection" not in http.get(f"{url}/models").headers  # it stays open
        process.terminate()
        wait_until(lambda: process.poll() is not None)
        assert "timeout graceful shutdown exceeded" not in process.stderr.read()  # uvicorn's words


def test_proxies_close_idle_connections_first(monkeypatch):
    configs = []

    def server(config) -> SimpleNamespace:
        configs.append(config)
        return SimpleNamespace(run=lambda sockets: None)

    monkeypatch.setattr("uvicorn.Server", server)
    serve(OpenAISettings(port=0))
    assert configs[0].timeout_keep_alive > 60  # nginx's and AWS's


def test_the_process_of_the_front_end_knows_the_origins_that_are_allowed(tmp_path):
    origins = ("https://chat.example.com", "http://localhost:3000")
    settings = OpenAISettings(triton_urls=("127.0.0.1:1",), port=0, allowed_origins=origins)
    with FrontEnd(settings, tmp_path / "openai.log") as front_end, httpx2.Client(trust_env=False) as http:
        for origin in origins:
            reply = http.get(f"{front_end.url}/v1/models", headers={"origin": origin})
            assert reply.headers["access-control-allow-origin"] == origin


def test_a_front_end_that_cannot_start_says_why(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = OpenAISettings(port=taken.getsockname()[1])
        front_end = FrontEnd(settings, tmp_path / "openai.log")
        with pytest.raises(FrontEndError, match=r"--port: 127\.0\.0\.1:.* cannot be used.*openai\.log$"), front_end:
            pass
        assert "cannot be used" in front_end.log_path.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n", "got no API key in {}, expected"), (b"\xff", "{} is not UTF-8"), (None, "{} cannot be read (No such file")],
)
def test_a_file_that_has_no_keys(content, message, tmp_path):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_api_keys(path)
    assert str(raised.value).startswith(f"--api-key-file: {message.format(path)}")


@pytest.mark.parametrize("key", ["", " "])
def test_an_empty_key_is_refused_in_one_line(key, monkeypatch):
    monkeypatch.setattr("backend.openai_server.serve.serve", lambda settings: None)
    result = CliRunner().invoke(app, ["openai", "--port", "0", "--api-key", "good", "--api-key", key])
    line = "--api-key: got an empty key, expected at least one character; leave the option out to serve without keys"
    assert (result.exit_code, result.output) == (1, f"error: {line}\n")


def test_no_request_that_the_document_allows_is_a_server_error(server):
    """schemathesis makes requests, right and wrong ones, from the front end's own OpenAPI document; the engine answers them."""
    with httpx2.Client(trust_env=False) as http:
        document = http.get(f"{server.url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    schema.config.generation.update(modes=list(GenerationMode))
    statuses = []

    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def one_request(data):
        operation = data.draw(st.sampled_from([each.ok() for each in schema.get_all_operations()]))
        case = data.draw(operation.as_strategy())
        if isinstance(case.body, dict):
            limit = "max_output_tokens" if "responses" in case.path else "max_tokens"
            case.body[limit] = 4  # answers are not what is tested
        response = case.call(headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        statuses.append(response.status_code)
        assert response.status_code < 500, (response.text, case.as_curl_command())

    one_request()
    assert {200, 400} <= set(statuses)
