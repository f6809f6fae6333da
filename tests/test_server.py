"""The real Triton server on a tiny engine, over gRPC and HTTP: answers, errors, cancelling, limits, starting and stopping."""

import asyncio
import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as aioclient
from transformers import AutoTokenizer

from backend.triton_server.launch import MODEL_NAME, MODEL_REPOSITORY, ServerError, TritonServer

NO_PROXY = [("grpc.enable_http_proxy", 0)]
TIMEOUT_S = 120  # for a response; only a hanging server needs it
QUESTION = "Count from 7 to 29."
ANY_PORTS = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}
DTYPES = {
    "text_input": ("BYTES", np.object_),
    "input_ids": ("INT32", np.int32),
    "stream": ("BOOL", np.bool_),
    "sampling_parameters": ("BYTES", np.object_),
    "max_tokens": ("INT32", np.int32),
    "temperature": ("FP32", np.float32),
    "seed": ("UINT64", np.uint64),
    "stop_words": ("BYTES", np.object_),
    "exclude_input_in_output": ("BOOL", np.bool_),
}
# Under way for a minute, and so still under way when the test acts: a hundred canvases, none of which may stop early.
ENDLESS = {"sampling_parameters": json.dumps({"ignore_eos": True, "confidence_threshold": 0, "max_tokens": 3000})}


class Refused(Exception):
    """The error that ended a request. `status` is there only when the request asked for a gRPC error."""

    def __init__(self, message: str, status: str | None):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Response:
    """One response with data."""

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    token_ids: list[int]
    canvas_index: int
    num_steps: int


def tensors(**values) -> list[grpcclient.InferInput]:
    """The inputs by name; a scalar becomes a tensor of one, a dict becomes JSON."""
    result = []
    for name, value in values.items():
        datatype, dtype = DTYPES[name]
        items = [item.encode() if isinstance(item, str) else item for item in (value if isinstance(value, list) else [value])]
        result.append(grpcclient.InferInput(name, [len(items)], datatype).set_data_from_numpy(np.array(items, dtype)))
    return result


def parsed(result) -> Response:
    values = {tensor.name: result.as_numpy(tensor.name) for tensor in result.get_response().outputs}
    scalars = [values[name][0].item() for name in ("num_input_tokens", "num_output_tokens", "canvas_index", "num_steps")]
    text, reason = (values[name][0].decode() for name in ("text_output", "finish_reason"))
    return Response(text, reason, *scalars[:2], values["output_ids"].tolist(), *scalars[2:])


class Stream:
    """A gRPC stream with one request in it."""

    def __init__(
        self,
        url: str,
        *,
        request_id: str = "",
        parameters: dict | None = None,
        timeout_us: int | None = None,
        headers: dict | None = None,
        **inputs,
    ):
        self._client = grpcclient.InferenceServerClient(url, channel_args=NO_PROXY)
        self._arrived: queue.Queue = queue.Queue()
        self._client.start_stream(lambda result, error: self._arrived.put((result, error)), headers=headers)
        self._client.async_stream_infer(
            MODEL_NAME,
            tensors(**inputs),
            request_id=request_id,
            parameters=parameters,
            timeout=timeout_us,
            enable_empty_final_response=True,
        )

    def __iter__(self) -> Iterator[Response]:
        """Ends at the empty final response. Raises Refused."""
        while True:
            result, error = self._arrived.get(timeout=TIMEOUT_S)
            if error is not None:
                raise Refused(error.message(), error.status())
            if result.get_response().parameters["triton_final_response"].bool_param:
                assert not result.get_response().outputs
                return
            yield parsed(result)

    def close(self, *, cancel: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def ask(url: str, **request) -> list[Response]:
    stream = Stream(url, **request)
    try:
        return list(stream)
    finally:
        stream.close()


def ask_once(url: str, **request) -> Response:
    (response,) = ask(url, **request)
    return response


def post(url: str, body: dict | str, *, path: str = "generate") -> urllib.request.addinfourl:
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(f"{url}/v2/models/{MODEL_NAME}/{path}", data=data, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def server(engine_dir) -> Iterator[TritonServer]:
    with TritonServer(engine_dir=engine_dir, **ANY_PORTS) as running:
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


@pytest.mark.parametrize("end", [cancel, disconnect, run_out_of_time])
def test_an_abandoned_request_makes_room(narrow_server, end):
    for _ in range(2):
        end(narrow_server)
    assert ask_once(narrow_server.grpc_url, text_input=QUESTION, max_tokens=1).num_output_tokens == 1


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


def leftovers(name: str) -> list[str]:
    """Processes, shared memory and files of the server whose staging directory is called `name`."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it may end while we look
            processes.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    found = [command for command in processes if name in command]
    return found + [str(path) for folder in ("/dev/shm", tempfile.gettempdir()) for path in Path(folder).glob(f"{name}*")]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_cleanly(engine_dir, stop):
    ports = ["--grpc-port", "0", "--http-port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "backend", "serve", "--engine", str(engine_dir), *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=MODEL_REPOSITORY.parent) as process:
        line = process.stdout.readline()
        url, log = re.fullmatch(r"ready  gRPC (\S+)  HTTP \S+  metrics \S+  log (\S+)\n", line).groups()
        assert ask_once(url, text_input=QUESTION, max_tokens=1).num_output_tokens == 1
        name = Path(log).parent.name
        assert leftovers(name)
        process.send_signal(stop)
    assert process.returncode == 0
    assert leftovers(name) == []


def test_a_stop_does_not_wait_for_long_requests(engine_dir):
    with TritonServer(engine_dir=engine_dir, exit_timeout_s=1, **ANY_PORTS) as server:
        stream = Stream(server.grpc_url, text_input=QUESTION, stream=True, **ENDLESS)
        next(iter(stream))
        name = server.shm_prefix
    with pytest.raises(Refused):
        list(stream)
    stream.close()
    assert leftovers(name) == []


def test_a_dead_server_is_noticed_and_cleared_away(engine_dir):
    with TritonServer(engine_dir=engine_dir, **ANY_PORTS) as server:
        name = server.shm_prefix
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerError, match="tritonserver ended with exit code -9"):
            while True:
                server.check_alive()
                time.sleep(0.01)
    assert leftovers(name) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine_dir": "/nowhere/engine"}, ["/nowhere/engine", "manifest.json"]),
        ({"model_repository": "/nowhere"}, ["/nowhere/diffusiongemma", "config.pbtxt", "--model-repository"]),
        ({"parameters": {"max_sequences": "0"}}, ["max_sequences", "'0'", "at least 1"]),
        ({"parameters": {"nonsense": "1"}}, ["nonsense", "config.pbtxt"]),
        ({"http_port": None}, ["http port", "--http-port"]),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(engine_dir, options, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if "http_port" in options:
            options = {"http_port": taken.getsockname()[1]}
        server = TritonServer(**{"engine_dir": engine_dir, **ANY_PORTS, **options})
        with pytest.raises(ServerError) as caught, server:
            pass
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []
