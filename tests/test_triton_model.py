"""The OpenAI front end's client of the Triton model, against a server of this process that answers as Triton does."""

import asyncio
import json
import socket
import time

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from backend.openai_server.errors import ApiError, ServerAway, WorkerDied
from backend.openai_server.triton_model import Part, TritonModel

NUMBERS = ("num_input_tokens", "num_cached_tokens", "num_output_tokens", "num_reasoning_tokens")


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers every request with one last part, these log probabilities in it."""

    def __init__(self, logprobs: str):
        self.texts = {"text_output": "é", "tool_calls": "[]", "finish_reason": "stop", "logprobs": logprobs}

    async def ModelStreamInfer(self, requests, context):  # noqa: N802 - gRPC's name
        async for _ in requests:
            response = service_pb2.ModelInferResponse(model_name="m")
            for name, text in self.texts.items():
                response.outputs.add(name=name, datatype="BYTES", shape=[1])
                response.raw_output_contents.append(serialize_byte_tensor(np.array([text.encode()], object)).item())
            for number, name in enumerate(NUMBERS):
                response.outputs.add(name=name, datatype="INT32", shape=[1])
                response.raw_output_contents.append(np.array([number], np.int32).tobytes())
            yield service_pb2.ModelStreamInferResponse(infer_response=response)


class Refusing(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, said: str):
        self.said = said

    async def ModelStreamInfer(self, requests, context):  # noqa: N802 - gRPC's name
        async for _ in requests:
            yield service_pb2.ModelStreamInferResponse(error_message=self.said)


async def whole(model: TritonModel) -> list[Part]:
    return [part async for part in model.generate({"text_input": "hello"}, "1")]


def answered(logprobs: str) -> list[Part]:
    async def run() -> list[Part]:
        server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Server(logprobs), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        model = TritonModel(f"127.0.0.1:{port}", "m")
        try:
            return await whole(model)
        finally:
            await model.close()
            await server.stop(None)

    return asyncio.run(run())


@pytest.mark.parametrize("num_tokens", [1, 60_000], ids=["short", "more than gRPC takes by itself"])
def test_an_answer_of_any_length_arrives(num_tokens):
    logprobs = [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "a", "logprob": -0.5}]}] * num_tokens
    [part] = answered(json.dumps(logprobs))
    assert (part.text, part.finish_reason) == ("é", "stop")
    assert [getattr(part, name) for name in NUMBERS] == [0, 1, 2, 3]
    assert part.logprobs == logprobs


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("Request for unknown model: 'm' is not found", ServerAway),
        ("[request id: 1] Server is stopping, scheduler for model has stopped accepting new inference requests", ServerAway),
        ("Server not ready", ServerAway),
        ("[request id: 1] [UNAVAILABLE] queue: got 9 waiting requests, at most 9; try again later", ApiError),
        ("[ABORTED] engine worker: ended by SIGKILL; see the server's log; send the request again", WorkerDied),
    ],
)
def test_a_refusal_says_whether_the_server_is_away_and_whether_its_worker_died(said, kind):
    async def run() -> None:
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Refusing(said), server)
        url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        model = TritonModel(url, "m")
        with pytest.raises(ApiError) as raised:
            await whole(model)
        assert (raised.value.status, type(raised.value)) == (503, kind)
        assert str(raised.value) == (f"Triton server at {url}: {said}" if kind is ServerAway else said.rpartition("] ")[2])
        await model.close()
        await server.stop(None)

    asyncio.run(run())


def test_a_server_that_comes_back_is_found_within_seconds():
    """However long it was away: gRPC by itself would then not even try for two minutes."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"127.0.0.1:{free.getsockname()[1]}"
        model, begun_s = TritonModel(url, "m"), time.monotonic()
        while time.monotonic() < begun_s + 6:  # by then gRPC's pauses are longer than what is allowed below
            with pytest.raises(ServerAway, match=f"^Triton server at {url}: cannot be reached \\(UNAVAILABLE\\); try again"):
                await whole(model)
            await asyncio.sleep(0.2)
        server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Server("[]"), server)
        server.add_insecure_port(url)
        await server.start()
        back_s = time.monotonic()
        while True:
            try:
                await whole(model)
                break
            except ServerAway:
                assert time.monotonic() < back_s + 2.9
                await asyncio.sleep(0.1)
        await model.close()
        await server.stop(None)

    asyncio.run(run())
