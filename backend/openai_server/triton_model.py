"""The Triton model as a stream of parts, over gRPC."""

import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc.aio as grpcclient
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from backend.openai_server.errors import ApiError, ServerAway, WorkerDied, bad_request
from backend.triton_server.signature import INPUTS

_DATATYPES = {each.name: "BYTES" if each.datatype == "STRING" else each.datatype for each in INPUTS}
# Codes of `RequestError`, which `triton_server/response.py` puts before the line.
_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "UNAVAILABLE": 503,
    "ABORTED": 503,
    "DEADLINE_EXCEEDED": 504,
    "CANCELLED": 503,
    "INTERNAL": 500,
}
_CHANNEL = [
    ("grpc.enable_http_proxy", 0),  # whatever proxy the environment names is not for a server that is named here
    # Without these, which tritonclient sets only where no others are given, gRPC refuses answers of more than 4 MiB: some
    # thousand tokens with their log probabilities.
    ("grpc.max_receive_message_length", grpcclient.MAX_GRPC_MESSAGE_SIZE),
    ("grpc.max_send_message_length", grpcclient.MAX_GRPC_MESSAGE_SIZE),
    # A server that comes back is found within seconds, where gRPC may take two minutes, and one that does not answer at all is
    # given up after five, not twenty: that is what the least of these means, whatever its name.
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.min_reconnect_backoff_ms", 5000),
]
_AWAY = re.compile("unknown model|[Ss]erver not ready|[Ss]erver is stopping")
_ERROR = re.compile(rf"(?:\[request id: [^\]]*\] )?\[(?P<code>{'|'.join(_STATUSES)})\] (?P<line>.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One response of the model: what it adds. finish_reason: None until the last part. logprobs: as in chat completions, None
    unless asked for."""

    text: str
    reasoning: str
    tool_calls: list[dict[str, Any]]
    finish_reason: str | None
    num_input_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_reasoning_tokens: int
    logprobs: list[dict[str, Any]] | None


class TritonModel:
    """A client of one model. Used in one event loop; `close` when done."""

    def __init__(self, url: str, name: str):
        """url: host:port of the server's gRPC service."""
        self.url, self.name = url, name
        self._client = grpcclient.InferenceServerClient(url, channel_args=_CHANNEL)

    async def close(self) -> None:
        await self._client.close()

    async def is_ready(self) -> bool:
        """Whether the model would take a request now."""
        try:
            return await self._client.is_model_ready(self.name, client_timeout=5)
        except InferenceServerException:
            return False

    async def generate(self, inputs: Mapping[str, Any], request_id: str) -> AsyncIterator[Part]:
        """Yields the parts of one answer. Leaving the iteration early cancels the request.

        Raises ApiError with the model's line.
        """

        async def requests() -> AsyncIterator[dict]:
            tensors = [_tensor(name, value) for name, value in inputs.items()]
            yield {"model_name": self.name, "inputs": tensors, "request_id": request_id}

        # Without the header triton_grpc_error, which would give errors a status: with it release 24.10 crashes now and then.
        responses = self._client.stream_infer(requests())
        failure = ApiError(503, f"Triton server at {self.url}: it ended the answer early; send the request again")
        finished = False
        try:
            # To the end of the stream, after the last part too: a stream that is left is cancelled.
            async for result, error in responses:
                if error is not None:
                    failure = _api_error(error.message(), self.url)
                else:
                    part = _part(result)
                    finished = part.finish_reason is not None
                    yield part
        except grpc.aio.AioRpcError as error:
            failure = ServerAway(f"Triton server at {self.url}: cannot be reached ({error.code().name}); try again later")
        finally:
            responses.cancel()  # nothing, unless the iteration was left early
        if not finished:
            raise failure


def _api_error(message: str, url: str) -> ApiError:
    """1. An error of our model, which says its code. 2. An error of the server itself: it has no such model, or ends."""
    ours = _ERROR.match(message)
    if ours:  # 1.
        code, line = ours["code"], ours["line"]
        if code == "ABORTED":
            return WorkerDied(line)
        return bad_request(line) if code == "INVALID_ARGUMENT" else ApiError(_STATUSES[code], line)
    line = " ".join(message.split())  # 2.
    return ServerAway(f"Triton server at {url}: {line}") if _AWAY.search(line) else ApiError(500, f"Triton server: {line}")


def _tensor(name: str, value: Any) -> grpcclient.InferInput:
    datatype = _DATATYPES[name]
    items = value if isinstance(value, list) else [value]
    if datatype == "BYTES":
        items = [item.encode() for item in items]
    return grpcclient.InferInput(name, [len(items)], datatype).set_data_from_numpy(
        np.array(items, triton_to_np_dtype(datatype))
    )


def _part(result: grpcclient.InferResult) -> Part:
    def string(name: str) -> str:
        array = result.as_numpy(name)
        return "" if array is None else array[0].decode()

    def number(name: str) -> int:
        return int(result.as_numpy(name)[0])

    return Part(
        text=string("text_output"),
        reasoning=string("reasoning_output"),
        tool_calls=json.loads(string("tool_calls")),
        finish_reason=string("finish_reason") or None,
        num_input_tokens=number("num_input_tokens"),
        num_cached_tokens=number("num_cached_tokens"),
        num_output_tokens=number("num_output_tokens"),
        num_reasoning_tokens=number("num_reasoning_tokens"),
        logprobs=json.loads(string("logprobs") or "null"),
    )
