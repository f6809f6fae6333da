"""`/v1/responses`: a chat's answer as a list of items, whole or as it comes. Nothing is stored."""

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseCreatedEvent,
    ResponseFailedEvent,
    ResponseIncompleteEvent,
    ResponseInProgressEvent,
    ResponseUsage,
)
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails

from backend.openai_server.balancer import Balancer
from backend.openai_server.choices import Choice, parts_of_choices
from backend.openai_server.errors import ApiError
from backend.openai_server.parameters import chat_inputs, client_names, new_id
from backend.openai_server.response_body import FunctionTool
from backend.openai_server.response_output import Event, Events, Output
from backend.openai_server.response_parameters import chat_body
from backend.openai_server.triton_model import Part


class Responses:
    """One request for a response. Raises ApiError 400 when made for parameters that are refused."""

    def __init__(self, model: Balancer, body: Mapping[str, Any]):
        chat, self._names = chat_body(body)
        try:
            self._inputs = chat_inputs(chat)
        except ApiError as error:
            raise error.renamed(self._names) from None
        self._model, self._chat_names = model, client_names(chat)
        self.id, self._created = new_id("resp_"), int(time.time())
        self._settings = _settings(body)
        self._events = Events()
        self._output = Output(self._events)
        self._answer = Choice()

    async def whole(self) -> dict[str, Any]:
        """The Response: that of the last event. Raises ApiError."""
        async with aclosing(self._told()) as events:
            async for event in events:
                last = event
        return last["response"]

    async def chunks(self) -> AsyncIterator[Event]:
        """The ResponseStreamEvents. Raises ApiError before the first; after it, the last one tells of the error."""
        begun = False
        async with aclosing(self._told()) as events:
            try:
                async for event in events:
                    begun = True
                    yield event
            except ApiError as error:
                if not begun:
                    raise
                failure = {"code": "server_error", "message": str(error)}
                yield self._events.make(ResponseFailedEvent, response=self._response("failed", error=failure))

    async def _told(self) -> AsyncIterator[Event]:
        """1. With the first part, that the response has begun. 2. What each part adds. 3. The end, with all of it."""
        begun = False
        async with aclosing(self._parts()) as parts:
            async for part in parts:
                if not begun:  # 1.
                    begun = True
                    for kind in (ResponseCreatedEvent, ResponseInProgressEvent):
                        yield self._events.make(kind, response=self._response("in_progress"))
                self._answer.add(part)
                for event in self._output.add(part):  # 2.
                    yield event
        is_whole = self._answer.finish_reason != "length"
        for event in self._output.end(is_whole=is_whole):  # 3.
            yield event
        if is_whole:
            response = self._response("completed", completed_at=int(time.time()), usage=_usage(self._answer))
            yield self._events.make(ResponseCompletedEvent, response=response)
        else:
            details = {"reason": "max_output_tokens"}
            response = self._response("incomplete", incomplete_details=details, usage=_usage(self._answer))
            yield self._events.make(ResponseIncompleteEvent, response=response)

    async def _parts(self) -> AsyncIterator[Part]:
        """Canvas by canvas, whether they are streamed or not: the order of items is that of the canvases."""
        asked = {"stream": True, "client_names": self._chat_names}
        async with aclosing(parts_of_choices(self._model, self._inputs, self.id, **asked)) as parts:
            try:
                async for _, part in parts:
                    yield part
            except ApiError as error:
                raise error.renamed(self._names) from None

    def _response(self, status: str, **more: Any) -> Response:
        nothing = {"error": None, "incomplete_details": None, "usage": None, "completed_at": None}
        return Response(
            id=self.id,
            object="response",
            created_at=self._created,
            status=status,
            output=self._output.items,
            **self._settings | nothing | more,
        )


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a response says of its request. `store` is not in OpenAI's type, but in what its API answers. Of tools it says only
    what has been checked: other keys, which OpenAI's type may know, may have any value."""
    reasoning, text = body.get("reasoning", {}), body.get("text", {})
    return {
        "background": False,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": body.get("max_tool_calls"),
        "metadata": body.get("metadata", {}),
        "model": body["model"],
        "parallel_tool_calls": body.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "prompt_cache_key": body.get("prompt_cache_key"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "safety_identifier": body.get("safety_identifier"),
        "service_tier": "default",
        "store": False,
        "temperature": body.get("temperature"),
        "text": {"format": text.get("format") or {"type": "text"}, "verbosity": text.get("verbosity") or "medium"},
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": [{name: tool.get(name) for name in FunctionTool.model_fields} for tool in body.get("tools", ())],
        "top_logprobs": body.get("top_logprobs", 0),
        "top_p": body.get("top_p"),
        "truncation": "disabled",
        "user": body.get("user"),
    }


def _usage(answer: Choice) -> ResponseUsage:
    """What the request added to the cache is not counted: 0."""
    return ResponseUsage(
        input_tokens=answer.num_input_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=answer.num_cached_tokens, cache_write_tokens=0),
        output_tokens=answer.num_output_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=answer.num_reasoning_tokens),
        total_tokens=answer.num_input_tokens + answer.num_output_tokens,
    )
