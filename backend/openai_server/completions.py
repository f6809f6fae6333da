"""`/v1/completions`: what follows a prompt that is taken as it is, whole or as it comes."""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from openai.types import Completion, CompletionChoice

from backend.openai_server.balancer import Balancer
from backend.openai_server.choices import Choice, finish_reason, parts_of_choices, usage
from backend.openai_server.logprobs import TextOffsets, completion_logprobs
from backend.openai_server.parameters import choices_a_prompt, completion_inputs, new_id
from backend.openai_server.triton_model import Part


class Completions:
    """One request for a completion. Raises ApiError 400 when made for parameters that are refused."""

    def __init__(self, model: Balancer, body: Mapping[str, Any]):
        self._model, self._name = model, body["model"]
        self._inputs = completion_inputs(body)
        self._choices_a_prompt = choices_a_prompt(body)
        self._include_usage = bool(body.get("stream_options", {}).get("include_usage"))
        self.id, self._created = new_id("cmpl-"), int(time.time())
        self._choices = [Choice() for _ in self._inputs]

    async def whole(self) -> dict[str, Any]:
        """The Completion. Raises ApiError."""
        async for _, _ in self._parts(stream=False):
            pass
        choices = [_choice(index, choice, choice.text, TextOffsets()) for index, choice in enumerate(self._choices)]
        return self._completion(choices, usage=usage(self._choices, self._choices_a_prompt))

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Completions with what each part adds, and at last the usage, if it is asked for. Raises ApiError."""
        offsets = [TextOffsets() for _ in self._choices]
        async with aclosing(self._parts(stream=True)) as parts:
            async for index, part in parts:
                choice = _choice(index, part, self._choices[index].text, offsets[index])
                yield self._completion([choice], **({"usage": None} if self._include_usage else {}))
        if self._include_usage:
            yield self._completion([], usage=usage(self._choices, self._choices_a_prompt))

    async def _parts(self, *, stream: bool) -> AsyncIterator[tuple[int, Part]]:
        async with aclosing(parts_of_choices(self._model, self._inputs, self.id, stream=stream)) as parts:
            async for index, part in parts:
                self._choices[index].add(part)
                yield index, part

    def _completion(self, choices: list[CompletionChoice], **more: Any) -> dict[str, Any]:
        completion = Completion.model_construct(
            id=self.id, object="text_completion", created=self._created, model=self._name, choices=choices, **more
        )
        return completion.model_dump(exclude_unset=True)


def _choice(index: int, of: Choice | Part, text: str, offsets: TextOffsets) -> CompletionChoice:
    """text: the choice's text so far. finish_reason is None, against OpenAI's type but not its API, in all chunks but the
    last."""
    return CompletionChoice.model_construct(
        index=index,
        text=of.text,
        finish_reason=finish_reason(of.finish_reason),
        logprobs=completion_logprobs(of.logprobs, text, offsets) if of.logprobs is not None else None,
    )
