"""`/v1/completions` over a stand-in for the Triton model."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from starlette.testclient import TestClient

from backend.openai_server.app import create_app
from backend.openai_server.completions import Completions
from backend.openai_server.settings import OpenAISettings
from backend.openai_server.triton_model import Part

PROMPT = "one two"


class Model:
    """Answers " three four" in two parts, after the prompt if that is asked for."""

    async def generate(self, inputs: Mapping[str, Any], request_id: str) -> AsyncIterator[Part]:
        echo = "" if inputs["exclude_input_in_output"] else inputs["text_input"]
        for text, token, reason in ((echo + " three", " three", None), (" four", " four", "stop")):
            entry = {"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": []}
            yield Part(
                text=text,
                reasoning="",
                tool_calls=[],
                finish_reason=reason,
                num_input_tokens=2,
                num_output_tokens=1,
                num_reasoning_tokens=0,
                logprobs=[entry],
            )

    async def close(self) -> None:
        pass


@pytest.mark.parametrize("echo", [False, True])
def test_log_probabilities_say_where_their_tokens_are(echo):
    """Not where the prompt is, which comes before them when it is echoed."""
    body = {"model": "m", "prompt": PROMPT, "echo": echo, "logprobs": 0}

    async def chunks() -> list[dict]:
        return [chunk async for chunk in Completions(Model(), body).chunks()]

    whole = asyncio.run(Completions(Model(), body).whole())["choices"]
    streamed = [chunk["choices"][0] for chunk in asyncio.run(chunks())]
    text = "".join(choice["text"] for choice in streamed)
    assert text == whole[0]["text"] == PROMPT * echo + " three four"
    for choices in (whole, streamed):
        places = [
            place
            for choice in choices
            for place in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True)
        ]
        assert places == [(token, text.index(token)) for token in (" three", " four")]


@pytest.mark.parametrize("says_its_length", [True, False])
def test_a_body_that_is_too_large_is_refused_before_it_is_kept(says_its_length):
    settings = OpenAISettings(max_body_bytes=1000)
    pieces_read = 0

    def pieces():
        nonlocal pieces_read
        for _ in range(1000):
            pieces_read += 1
            yield b" " * 100

    with TestClient(create_app(settings, Model())) as client:
        body = b" " * 1001 if says_its_length else pieces()
        refused = client.post("/v1/completions", content=body)
        assert refused.status_code == 413
        [message] = refused.json()["error"]["message"].splitlines()
        assert message == "body: got more than 1000 bytes, expected at most these; send fewer or smaller images"
        served = client.post("/v1/completions", json={"model": "diffusiongemma", "prompt": PROMPT})
        assert served.json()["choices"][0]["text"] == " three four"
