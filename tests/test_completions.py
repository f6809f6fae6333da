"""`/v1/completions` over a stand-in for the Triton model."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from backend.openai_server.completions import Completions
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
