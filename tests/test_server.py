"""The real Triton server on a tiny engine: its answers over gRPC and HTTP."""

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import tritonclient.grpc.aio as aioclient
from server_clients import ANY_PORTS, NO_PROXY, QUESTION, ask, ask_once, metrics, parsed, post, tensors
from transformers import AutoTokenizer
from waiting import wait_until

from backend.metrics import flat_series
from backend.triton_server.launch import MODEL_NAME, TritonServer


@pytest.fixture(scope="module")
def server(engine_dir) -> Iterator[TritonServer]:
    with TritonServer(engine_dir=engine_dir, parameters={"cpu_threads": "2"}, **ANY_PORTS) as running:
        yield running


@pytest.fixture(scope="module")
def chat(engine_dir) -> str:
    """The question inside the chat template, as text."""
    messages = [{"role": "user", "content": QUESTION}]
    return AutoTokenizer.from_pretrained(engine_dir).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("sampling", [{"seed": 3, "temperature": 0.9}, {"seed": 2**64 - 1}, {"seed": 1, "temperature": 0.0}])
def test_streamed_equals_unstreamed(server, chat, sampling):
    request = {"text_input": chat, "sampling_parameters": '{"ignore_eos": true}', "max_tokens": 70, **sampling}
    whole = ask_once(server.grpc_url, **request)
    streamed = ask(server.grpc_url, **request, stream=True)
    assert "".join(part.text for part in streamed) == whole.text
    assert [token for part in streamed for token in part.token_ids] == whole.token_ids
    assert sum(part.num_steps for part in streamed) == whole.num_steps
    assert [part.canvas_index for part in streamed] == list(range(whole.canvas_index + 1))
    assert [part.finish_reason for part in streamed] == [""] * whole.canvas_index + [whole.finish_reason]
    assert {part.num_input_tokens for part in streamed} == {whole.num_input_tokens}
    assert all(part.num_output_tokens == len(part.token_ids) for part in [whole, *streamed])


@pytest.mark.parametrize("max_tokens", [1, 31, 32, 33, 64, 65])
def test_max_tokens_is_exact(server, max_tokens):
    sampling = json.dumps({"ignore_eos": True})
    response = ask_once(server.grpc_url, text_input=QUESTION, max_tokens=max_tokens, sampling_parameters=sampling)
    assert (response.num_output_tokens, response.finish_reason) == (max_tokens, "length")


@pytest.mark.parametrize("sampling", [{"seed": 11}, {"seed": 12, "temperature": 0.0}])
def test_the_same_request_has_the_same_answer(server, chat, sampling):
    first, second = (ask_once(server.grpc_url, text_input=chat, **sampling) for _ in range(2))
    assert first == second


def test_token_ids_equal_text(server, engine_dir, chat):
    token_ids = AutoTokenizer.from_pretrained(engine_dir)(chat, add_special_tokens=False).input_ids
    as_text = ask_once(server.grpc_url, text_input=chat, seed=1)
    assert ask_once(server.grpc_url, input_ids=token_ids, seed=1) == as_text
    assert as_text.num_input_tokens == len(token_ids)


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_comes_back_in_the_form_it_went_in(server, stream):
    options = {"seed": 1, "max_tokens": 40, "sampling_parameters": '{"ignore_eos": true}', "stream": stream}
    text, ids = "Add 1 and 2.", [5, 6, 7]
    for given, field in (({"text_input": text}, "text"), ({"input_ids": ids}, "token_ids")):
        without = ask(server.grpc_url, **given, **options)
        included = ask(server.grpc_url, **given, **options, exclude_input_in_output=False)
        (prompt,) = given.values()
        assert getattr(included[0], field) == prompt + getattr(without[0], field)
        assert included[1:] == without[1:]
        assert included[0].num_output_tokens == without[0].num_output_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_stop_words(server, chat, stream, as_json):
    whole = ask_once(server.grpc_url, text_input=chat, seed=5).text
    stop = whole[len(whole) // 2 :][:3]
    where = {"sampling_parameters": json.dumps({"stop": [stop]})} if as_json else {"stop_words": ["never said", stop]}
    parts = ask(server.grpc_url, text_input=chat, seed=5, stream=stream, **where)
    assert "".join(part.text for part in parts) == whole[: whole.index(stop)]
    assert parts[-1].finish_reason == "stop"


def test_sixteen_clients_get_what_each_gets_alone(server):
    requests = [
        {"text_input": f"Count from {n} to {3 * n}.", "seed": n, "max_tokens": 8 + 4 * n, "stream": n % 2 == 0}
        for n in range(16)
    ]
    alone = [ask(server.grpc_url, **request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as threads:
        together = list(threads.map(lambda request: ask(server.grpc_url, **request), requests))
    assert together == alone


def test_aio_client(server, chat):
    async def texts() -> list[str]:
        async def requests():
            yield {"model_name": MODEL_NAME, "inputs": tensors(text_input=chat, seed=2, stream=True)}

        async with aioclient.InferenceServerClient(server.grpc_url, channel_args=NO_PROXY) as client:
            responses = [response async for response in client.stream_infer(requests())]
        assert [error for _, error in responses if error is not None] == []
        return [parsed(result).text for result, _ in responses]

    assert "".join(asyncio.run(texts())) == ask_once(server.grpc_url, text_input=chat, seed=2).text


def test_generate(server, chat):
    """Over HTTP, keys that are no inputs become request parameters."""
    body = {"text_input": chat, "seed": 2**64 - 1, "max_tokens": 40, "stop_words": ["never said"], "t_min": 0.3, "id": "r1"}
    with post(server.http_url, body) as reply:
        answer = json.load(reply)
    sampling = json.dumps({"t_min": 0.3})
    expected = ask_once(server.grpc_url, text_input=chat, seed=2**64 - 1, max_tokens=40, sampling_parameters=sampling)
    assert (answer["text_output"], answer["output_ids"]) == (expected.text, expected.token_ids)
    assert answer["num_steps"] == expected.num_steps


def test_generate_stream(server, chat):
    body = {"text_input": chat, "seed": 4, "stream": True}
    with post(server.http_url, body, path="generate_stream") as reply:
        events = [json.loads(line[len(b"data: ") :]) for line in reply if line.startswith(b"data: ")]
    expected = ask(server.grpc_url, text_input=chat, seed=4, stream=True)
    assert [event["text_output"] for event in events] == [part.text for part in expected]
    assert events[-1]["finish_reason"] == expected[-1].finish_reason


def test_metrics_say_what_was_done(server, chat):
    """Every series of the table is there, and those that count follow two requests."""
    answers = [ask_once(server.grpc_url, text_input=chat, seed=seed, max_tokens=40) for seed in (1, 2)]
    increments = {
        "requests_total": 2,
        "input_tokens_total": sum(each.num_input_tokens for each in answers),
        "output_tokens_total": sum(each.num_output_tokens for each in answers),
        "queue_seconds_count": 2,
        "first_canvas_seconds_count": 2,
        "canvas_seconds_count": sum(each.canvas_index + 1 for each in answers),
        "canvas_steps_count": sum(each.canvas_index + 1 for each in answers),
        "canvas_steps_sum": sum(each.num_steps for each in answers),
        "worker_restarts_total": 0,
    }

    def counted() -> dict[str, float]:
        return {name: metrics(server.metrics_url, f"diffusiongemma_{name}") for name in increments}

    time.sleep(1)  # what was done until now is exported within two intervals of 0.2 s
    before = counted()
    again = [ask_once(server.grpc_url, text_input=chat, seed=seed, max_tokens=40) for seed in (1, 2)]
    assert again == answers
    wait_until(lambda: counted() == {name: before[name] + increment for name, increment in increments.items()})
    infinite = 'diffusiongemma_canvas_steps_bucket{instance="diffusiongemma_0_0",le="+Inf",model="diffusiongemma"}'
    assert metrics(server.metrics_url, infinite) == counted()["canvas_steps_count"]
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(server.metrics_url) as reply:
        exported = {line.partition("{")[0] for line in reply.read().decode().splitlines()}
    assert {series.name for series in flat_series()} <= exported
