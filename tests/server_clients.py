"""Clients of the model over gRPC and HTTP, for the tests of the server."""

import itertools
import json
import queue
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import tritonclient.grpc as grpcclient

from backend.triton_server.launch import MODEL_NAME
from backend.triton_server.signature import INPUTS, OUTPUTS

NO_PROXY = [("grpc.enable_http_proxy", 0)]
TIMEOUT_S = 120  # for a response; only a hanging server needs it
QUESTION = "Count from 7 to 29."
ANY_PORTS = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}
_NUMPY = {"BOOL": np.bool_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "STRING": np.object_}
DTYPES = {spec.name: ("BYTES" if spec.datatype == "STRING" else spec.datatype, _NUMPY[spec.datatype]) for spec in INPUTS}
_OUTPUTS = {(spec.name, "BYTES" if spec.datatype == "STRING" else spec.datatype) for spec in OUTPUTS}
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
    assert {(tensor.name, tensor.datatype) for tensor in result.get_response().outputs} <= _OUTPUTS
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
        stream_timeout_s: float | None = None,
        headers: dict | None = None,
        **inputs,
    ):
        self._client = grpcclient.InferenceServerClient(url, channel_args=NO_PROXY)
        self._arrived: queue.Queue = queue.Queue()
        self._client.start_stream(
            lambda result, error: self._arrived.put((result, error)), headers=headers, stream_timeout=stream_timeout_s
        )
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

    def goes_on(self, *, responses: int) -> bool:
        """Whether so many more come before an error does."""
        try:
            return len(list(itertools.islice(self, responses))) == responses
        except Refused:
            return False

    def drop_connection(self) -> None:
        self._client._channel.close()

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


def metrics(url: str, name: str) -> float:
    """The value of one series of /metrics: its name with labels, or the sum of all of that name."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=TIMEOUT_S) as reply:
        lines = reply.read().decode().splitlines()
    return sum(
        float(value)
        for series, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
        if name in (series, series.partition("{")[0])
    )
