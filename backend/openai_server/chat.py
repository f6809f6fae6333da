"""`/v1/chat/completions`: a chat's answers, whole or as they come."""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice as WholeChoice
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs

from backend.openai_server.balancer import Balancer
from backend.openai_server.choices import Choice, finish_reason, parts_of_choices, usage
from backend.openai_server.parameters import chat_inputs, client_names, new_id
from backend.openai_server.triton_model import Part


class ChatCompletions:
    """One request for a chat completion. Raises ApiError 400 when made for parameters that are refused."""

    def __init__(self, model: Balancer, body: Mapping[str, Any]):
        self._model, self._name = model, body["model"]
        self._inputs, self._client_names = chat_inputs(body), client_names(body)
        self._include_usage = bool(body.get("stream_options", {}).get("include_usage"))
        self.id, self._created = new_id("chatcmpl-"), int(time.time())
        self._choices = [Choice() for _ in self._inputs]

    async def whole(self) -> dict[str, Any]:
        """The ChatCompletion. Raises ApiError."""
        async for _, _ in self._parts(stream=False):
            pass
        completion = ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self._created,
            model=self._name,
            choices=[_whole(index, choice) for index, choice in enumerate(self._choices)],
            usage=usage(self._choices, len(self._choices)),
        )
        return completion.model_dump(exclude_unset=True)

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The ChatCompletionChunks. Raises ApiError.

        1. The role, before the first part of a choice. 2. What the part adds. 3. The finish_reason in a chunk of its own.
        4. After all choices the usage, if it is asked for.
        """
        num_calls = [0] * len(self._choices)
        opened: set[int] = set()
        async with aclosing(self._parts(stream=True)) as parts:
            async for index, part in parts:
                if index not in opened:  # 1.
                    opened.add(index)
                    yield self._chunk(
                        [ChunkChoice(index=index, delta=ChoiceDelta(role="assistant", content=""), finish_reason=None)]
                    )
                if part.text or part.reasoning or part.tool_calls or part.logprobs:  # 2.
                    delta = _delta(part, num_calls[index])
                    num_calls[index] += len(part.tool_calls)
                    logprobs = {"logprobs": ChunkLogprobs(content=part.logprobs)} if part.logprobs is not None else {}
                    yield self._chunk([ChunkChoice(index=index, delta=delta, finish_reason=None, **logprobs)])
                if part.finish_reason:  # 3.
                    reason = finish_reason(part.finish_reason)
                    yield self._chunk([ChunkChoice(index=index, delta=ChoiceDelta(), finish_reason=reason)])
        if self._include_usage:  # 4.
            yield self._chunk([], usage=usage(self._choices, len(self._choices)))

    async def _parts(self, *, stream: bool) -> AsyncIterator[tuple[int, Part]]:
        asked = {"stream": stream, "client_names": self._client_names}
        async with aclosing(parts_of_choices(self._model, self._inputs, self.id, **asked)) as parts:
            async for index, part in parts:
                self._choices[index].add(part)
                yield index, part

    def _chunk(self, choices: list[ChunkChoice], **more: Any) -> dict[str, Any]:
        if self._include_usage:
            more = {"usage": None, **more}
        chunk = ChatCompletionChunk(
            id=self.id, object="chat.completion.chunk", created=self._created, model=self._name, choices=choices, **more
        )
        return chunk.model_dump(exclude_unset=True)


def _whole(index: int, choice: Choice) -> WholeChoice:
    """reasoning_content is not in OpenAI's type, but what clients look for."""
    message = ChatCompletionMessage(
        role="assistant",
        content=choice.text if choice.text or not choice.tool_calls else None,
        refusal=None,
        reasoning_content=choice.reasoning or None,
        **({"tool_calls": choice.tool_calls} if choice.tool_calls else {}),
    )
    logprobs = ChoiceLogprobs(content=choice.logprobs, refusal=None) if choice.logprobs is not None else None
    return WholeChoice(index=index, message=message, finish_reason=finish_reason(choice.finish_reason), logprobs=logprobs)


def _delta(part: Part, num_calls: int) -> ChoiceDelta:
    fields: dict[str, Any] = {}
    if part.reasoning:
        fields["reasoning_content"] = part.reasoning
    if part.text:
        fields["content"] = part.text
    if part.tool_calls:
        fields["tool_calls"] = [{"index": num_calls + at, **call} for at, call in enumerate(part.tool_calls)]
    return ChoiceDelta(**fields)
