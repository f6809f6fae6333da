"""A stand-in for the Triton model, and the front end over it."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.testclient import TestClient

from backend.openai_server.app import create_app
from backend.openai_server.settings import OpenAISettings
from backend.openai_server.triton_model import Part

PROMPT = "one two"


class Model:
    """Answers " three four" in two parts, after the prompt if that is asked for. asked: the inputs of each answer."""

    def __init__(self):
        self.asked = []

    async def generate(self, inputs: Mapping[str, Any], request_id: str) -> AsyncIterator[Part]:
        self.asked.append(inputs)
        echo = "" if inputs.get("exclude_input_in_output", True) else inputs["text_input"]
        for text, token, reason in ((echo + " three", " three", None), (" four", " four", "stop")):
            entry = {"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": []}
            yield Part(
                text=text,
                reasoning="",
                tool_calls=[],
                finish_reason=reason,
                num_input_tokens=2,
                num_cached_tokens=1,
                num_output_tokens=1,
                num_reasoning_tokens=0,
                logprobs=[entry],
            )

    async def close(self) -> None:
        pass


def posted(content: str | bytes, *, route: str = "completions") -> tuple[int, dict, list[Mapping[str, Any]]]:
    """(status, answer, what the model was asked) of one request."""
    model = Model()
    with TestClient(create_app(OpenAISettings(), model), raise_server_exceptions=False) as client:
        reply = client.post(f"/v1/{route}", content=content)
    return reply.status_code, reply.json(), model.asked


def refusal(content: str | bytes, **where: str) -> tuple[str, str | None]:
    """(message, param) of a request that is refused for what it says."""
    status, answer, asked = posted(content, **where)
    assert (status, asked) == (400, [])
    [message] = answer["error"]["message"].splitlines()
    return message, answer["error"]["param"]
