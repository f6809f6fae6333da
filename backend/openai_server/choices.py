"""Several answers to one request, at once."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from openai.types.completion_usage import CompletionTokensDetails, CompletionUsage, PromptTokensDetails

from backend.openai_server.balancer import Balancer
from backend.openai_server.errors import ApiError
from backend.openai_server.triton_model import Part

_SAME_NAMES: Mapping[str, str] = MappingProxyType({})


async def parts_of_choices(
    model: Balancer,
    inputs: Sequence[Mapping[str, Any]],
    request_id: str,
    *,
    stream: bool,
    client_names: Mapping[str, str] = _SAME_NAMES,
) -> AsyncIterator[tuple[int, Part]]:
    """Yields (index, part) of every choice, as the parts come; without `stream` a choice is one part. Leaving the iteration
    early cancels them all, and so does the first error, which is raised. client_names: see `ApiError.renamed`."""
    together = {"stream": stream} | ({"num_choices": len(inputs)} if len(inputs) > 1 else {})
    arrived: asyncio.Queue[tuple[int, Part | None]] = asyncio.Queue()

    async def run(index: int) -> None:
        try:
            name = request_id if len(inputs) == 1 else f"{request_id}-{index}"
            async with aclosing(model.generate({**inputs[index], **together}, name)) as parts:
                async for part in parts:
                    arrived.put_nowait((index, part))
        finally:
            arrived.put_nowait((index, None))

    tasks = [asyncio.create_task(run(index)) for index in range(len(inputs))]
    try:
        running = len(tasks)
        while running:
            index, part = await arrived.get()
            if part is not None:
                yield index, part
            else:
                running -= 1
                await tasks[index]  # raises what ended it
    except ApiError as error:
        raise error.renamed(client_names) from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(kw_only=True)
class Choice:
    """The parts of one choice, put together."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None
    num_input_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_reasoning_tokens: int = 0
    logprobs: list[dict[str, Any]] | None = None

    def add(self, part: Part) -> None:
        self.text += part.text
        self.reasoning += part.reasoning
        self.tool_calls += part.tool_calls
        self.finish_reason = part.finish_reason
        self.num_input_tokens, self.num_cached_tokens = part.num_input_tokens, part.num_cached_tokens
        self.num_output_tokens += part.num_output_tokens
        self.num_reasoning_tokens += part.num_reasoning_tokens
        if part.logprobs is not None:
            self.logprobs = (self.logprobs or []) + part.logprobs


def usage(choices: Sequence[Choice], choices_a_prompt: int) -> CompletionUsage:
    """A prompt counts once, however many choices it has."""
    of_prompts = choices[::choices_a_prompt]
    prompt = sum(choice.num_input_tokens for choice in of_prompts)
    completion = sum(choice.num_output_tokens for choice in choices)
    details = CompletionTokensDetails(reasoning_tokens=sum(choice.num_reasoning_tokens for choice in choices))
    return CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        completion_tokens_details=details,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(choice.num_cached_tokens for choice in of_prompts)),
    )


def finish_reason(reason: str | None) -> str | None:
    """As OpenAI's API says it, which has no name for an answer that was cancelled on the server."""
    return "stop" if reason == "cancelled" else reason
