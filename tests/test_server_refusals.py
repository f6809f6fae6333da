"""The real Triton server on a tiny engine: what it refuses, and how a request makes room when its client has gone."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import pytest
from server_clients import ANY_PORTS, ENDLESS, QUESTION, Refused, Stream, ask, ask_once, metrics, post
from waiting import wait_until

from backend.triton_server.launch import TritonServer


@pytest.fixture(scope="module")
def server(engine_dir) -> Iterator[TritonServer]:
    with TritonServer(engine_dir=engine_dir, **ANY_PORTS) as running:
        yield running


BAD_REQUESTS = {
    "no prompt": ({}, ["text_input", "input_ids"]),
    "two prompts": ({"text_input": QUESTION, "input_ids": [5]}, ["text_input", "input_ids"]),
    "empty text": ({"text_input": ""}, ["prompt"]),
    "no token ids": ({"input_ids": []}, ["prompt"]),
    "token id beyond the vocabulary": ({"input_ids": [5, 1_000_000]}, ["1000000"]),
    "negative token id": ({"input_ids": [5, -1]}, ["-1"]),
    "prompt too long": ({"input_ids": [5] * 300_000}, ["300000"]),
    "no tokens": ({"text_input": QUESTION, "max_tokens": 0}, ["max_tokens", "0"]),
    "too many tokens": ({"text_input": QUESTION, "max_tokens": 2**31 - 1}, ["2147483647"]),
    "bad temperature": ({"text_input": QUESTION, "temperature": -1.0}, ["temperature", "-1.0"]),
    "empty stop word": ({"text_input": QUESTION, "stop_words": ["a", ""]}, ["stop"]),
    "malformed JSON": ({"text_input": QUESTION, "sampling_parameters": "{bad"}, ["sampling_parameters", "malformed JSON"]),
    "unknown parameter": ({"text_input": QUESTION, "sampling_parameters": '{"nonsense": 1}'}, ["nonsense"]),
    "unsupported parameter": ({"text_input": QUESTION, "sampling_parameters": '{"n": 2}'}, ["n=2"]),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_gets_one_line_and_its_code(server, case):
    inputs, words = BAD_REQUESTS[case]
    with pytest.raises(Refused) as over_grpc:
        ask(server.grpc_url, request_id="r1", **inputs)
    message = str(over_grpc.value)
    with pytest.raises(urllib.error.HTTPError) as over_http:
        post(server.http_url, {**inputs, "id": "r1"})
    assert over_http.value.code == 400
    assert json.load(over_http.value)["error"] == message
    assert message.startswith("[request id: r1] ")
    assert "\n" not in message and "/" not in message and len(message) < 600
    assert [word for word in words if word not in message] == []
    assert ask_once(server.grpc_url, text_input=QUESTION, max_tokens=1).finish_reason


def test_request_parameters_are_sampling_parameters(server):
    with pytest.raises(Refused, match="nonsense"):
        ask(server.grpc_url, text_input=QUESTION, parameters={"nonsense": 1})
    assert ask_once(server.grpc_url, text_input=QUESTION, parameters={"max_tokens": 1}).num_output_tokens == 1


@pytest.mark.parametrize(
    ("request_", "words", "status"),
    [
        ({"text_input": ""}, "prompt", "INVALID_ARGUMENT"),
        ({"text_input": QUESTION, "timeout_us": 1}, "not finished within its time-out", "UNAVAILABLE"),
    ],
)
def test_the_code_of_an_error(server, request_, words, status):
    with pytest.raises(Refused, match=words) as caught:
        ask(server.grpc_url, **request_, headers={"triton_grpc_error": "true"})
    assert caught.value.status == f"StatusCode.{status}"


def test_a_time_out_over_http(server):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server.http_url, {"text_input": QUESTION, "timeout": 1})
    assert "not finished within its time-out" in json.load(caught.value)["error"]


@pytest.fixture(scope="module")
def narrow_server(engine_dir) -> Iterator[TritonServer]:
    """One sequence at a time and one waiting; what waits too long is refused, so that a request not freed is noticed."""
    parameters = {"max_sequences": "1", "max_queued": "1", "queue_timeout_s": "5"}
    with TritonServer(engine_dir=engine_dir, parameters=parameters, **ANY_PORTS) as running:
        yield running


def cancel(server: TritonServer) -> None:
    stream = Stream(server.grpc_url, text_input=QUESTION, stream=True, **ENDLESS)
    next(iter(stream))
    stream.close(cancel=True)


def disconnect(server: TritonServer) -> None:
    reply = post(server.http_url, {"text_input": QUESTION, "stream": True, **ENDLESS}, path="generate_stream")
    assert reply.readline().startswith(b"data: ")
    reply.close()


def run_out_of_time(server: TritonServer) -> None:
    stream = Stream(server.grpc_url, text_input=QUESTION, stream=True, timeout_us=500_000, **ENDLESS)
    with pytest.raises(Refused, match="time-out"):
        list(stream)
    stream.close()


def miss_the_clients_deadline(server: TritonServer) -> None:
    stream = Stream(server.grpc_url, text_input=QUESTION, stream=True, stream_timeout_s=0.5, **ENDLESS)
    with pytest.raises(Refused, match="Deadline Exceeded"):
        list(stream)
    stream.close()


def drop_the_connection(server: TritonServer) -> None:
    stream = Stream(server.grpc_url, text_input=QUESTION, stream=True, **ENDLESS)
    next(iter(stream))
    stream.drop_connection()


ENDS = [cancel, disconnect, run_out_of_time, miss_the_clients_deadline, drop_the_connection]


@pytest.mark.parametrize("end", ENDS)
def test_an_abandoned_request_makes_room(narrow_server, end):
    """For the next request, which could not wait for as long as the first would run, in the batch and in the KV pages."""
    url = narrow_server.metrics_url
    wait_until(lambda: metrics(url, "diffusiongemma_kv_pages") > 0)
    for _ in range(2):
        end(narrow_server)
    wait_until(lambda: metrics(url, "diffusiongemma_active_requests") == metrics(url, "diffusiongemma_kv_pages_used") == 0)
    assert ask_once(narrow_server.grpc_url, text_input=QUESTION, max_tokens=1).num_output_tokens == 1


def test_choices_that_never_have_places_together_are_refused(narrow_server):
    request = {"text_input": QUESTION, "max_tokens": 1}
    with pytest.raises(Refused) as refused:
        ask(narrow_server.grpc_url, **request, num_choices=3)
    line = (
        "n: got 3 choices in all, expected at most 2, the places in batch and queue; ask for fewer at once, or raise max_queued"
    )
    assert str(refused.value) == f"[INVALID_ARGUMENT] {line}"
    assert ask_once(narrow_server.grpc_url, **request, num_choices=2).num_output_tokens == 1


def test_a_full_server_says_so(narrow_server):
    request = {"text_input": QUESTION, "stream": True, "headers": {"triton_grpc_error": "true"}, **ENDLESS}
    active = Stream(narrow_server.grpc_url, **request)
    next(iter(active))
    waiting = [Stream(narrow_server.grpc_url, **request) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        first_answers = [threads.submit(next, iter(stream)) for stream in waiting]
        refused = next(as_completed(first_answers)).exception()  # one of the two waits, the other finds the queue full
        for stream in (*waiting, active):
            stream.close(cancel=True)
    assert isinstance(refused, Refused)
    assert "at most 1" in str(refused)
    assert refused.status == "StatusCode.UNAVAILABLE"
