"""The OpenAI front end's client of the Triton model, against a server of this process that answers as Triton does."""

import asyncio
import json

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from backend.openai_server.triton_model import Part, TritonModel

NUMBERS = ("num_input_tokens", "num_output_tokens", "num_reasoning_tokens")


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


def answered(logprobs: str) -> list[Part]:
    async def run() -> list[Part]:
        server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Server(logprobs), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        model = TritonModel(f"127.0.0.1:{port}", "m")
        try:
            return [part async for part in model.generate({"text_input": "hello"}, "1")]
        finally:
            await model.close()
            await server.stop(None)

    return asyncio.run(run())


@pytest.mark.parametrize("num_tokens", [1, 60_000], ids=["short", "more than gRPC takes by itself"])
def test_an_answer_of_any_length_arrives(num_tokens):
    logprobs = [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "a", "logprob": -0.5}]}] * num_tokens
    [part] = answered(json.dumps(logprobs))
    assert (part.text, part.finish_reason, part.num_output_tokens) == ("é", "stop", 1)
    assert part.logprobs == logprobs
