"""Parts of an answer → the output items of a response, and the events that tell of them.

An item ends where one of another kind begins. Of a canvas that has several kinds the thought comes first, then text, then
calls.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from openai.types.responses import (
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseFunctionCallArgumentsDeltaEvent,
    ResponseFunctionCallArgumentsDoneEvent,
    ResponseFunctionToolCall,
    ResponseOutputItem,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseReasoningItem,
    ResponseReasoningTextDeltaEvent,
    ResponseReasoningTextDoneEvent,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
)
from pydantic import BaseModel

from backend.openai_server.parameters import new_id
from backend.openai_server.triton_model import Part

Status = Literal["in_progress", "completed", "incomplete"]
Event = dict[str, Any]


class Events:
    """Makes the events of one response, which are numbered."""

    def __init__(self):
        self._numbers = itertools.count()

    def make(self, kind: type[BaseModel], **fields: Any) -> Event:
        [name] = get_args(kind.model_fields["type"].annotation)
        event = kind(type=name, sequence_number=next(self._numbers), **fields)
        return event.model_dump(exclude_unset=True, by_alias=True)


@dataclass(kw_only=True)
class _Message:
    """A message that is being written."""

    id: str = field(default_factory=lambda: new_id("msg_"))
    text: str = ""
    logprobs: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def part(self) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": self.text,
            "annotations": [],
            "logprobs": [_whole(each) for each in self.logprobs],
        }

    def item(self, status: Status, parts: Sequence[Mapping[str, Any]]) -> ResponseOutputMessage:
        return ResponseOutputMessage(id=self.id, type="message", role="assistant", status=status, content=list(parts))

    def add(self, text: str, logprobs: Sequence[Mapping[str, Any]]) -> tuple[type[BaseModel], dict[str, Any]]:
        self.text += text
        self.logprobs += logprobs
        return ResponseTextDeltaEvent, {"delta": text, "logprobs": [_short(each) for each in logprobs]}

    def done(self) -> tuple[type[BaseModel], dict[str, Any]]:
        return ResponseTextDoneEvent, {"text": self.text, "logprobs": [_short(each) for each in self.logprobs]}


@dataclass(kw_only=True)
class _Thought:
    """A thought that is being written."""

    id: str = field(default_factory=lambda: new_id("rs_"))
    text: str = ""

    @property
    def part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}

    def item(self, status: Status, parts: Sequence[Mapping[str, Any]]) -> ResponseReasoningItem:
        return ResponseReasoningItem(id=self.id, type="reasoning", summary=[], status=status, content=list(parts))

    def add(self, text: str) -> tuple[type[BaseModel], dict[str, Any]]:
        self.text += text
        return ResponseReasoningTextDeltaEvent, {"delta": text}

    def done(self) -> tuple[type[BaseModel], dict[str, Any]]:
        return ResponseReasoningTextDoneEvent, {"text": self.text}


class Output:
    """The output of one response, as it comes."""

    def __init__(self, events: Events):
        self._events = events
        self._ended: list[ResponseOutputItem] = []
        self._open: _Message | _Thought | None = None
        self._logprobs: list[Mapping[str, Any]] = []  # of tokens that no message has yet

    @property
    def items(self) -> list[ResponseOutputItem]:
        """All items so far; one that has not ended is incomplete."""
        return self._ended + ([self._open.item("incomplete", [self._open.part])] if self._open else [])

    def add(self, part: Part) -> Iterator[Event]:
        """What the part adds. The log probabilities of its tokens, whatever they are of, go to the next text."""
        self._logprobs += part.logprobs or ()
        if part.reasoning:
            yield from self._begin(_Thought)
            yield self._written(*self._open.add(part.reasoning))
        if part.text or (self._logprobs and isinstance(self._open, _Message)):
            yield from self._begin(_Message)
            logprobs, self._logprobs = self._logprobs, []
            yield self._written(*self._open.add(part.text, logprobs))
        for call in part.tool_calls:
            yield from self._end("completed")
            yield from self._call(call["id"], **call["function"])

    def end(self, *, is_whole: bool) -> Iterator[Event]:
        """Ends the last item. What the model ended by itself has a message or a call, be it an empty message."""
        if is_whole and not any(item.type != "reasoning" for item in self.items):
            yield from self._begin(_Message)
        yield from self._end("completed" if is_whole else "incomplete")

    def _begin(self, kind: type[_Message] | type[_Thought]) -> Iterator[Event]:
        """Nothing, if an item of the kind is open."""
        if isinstance(self._open, kind):
            return
        yield from self._end("completed")
        self._open = kind()
        yield self._event(ResponseOutputItemAddedEvent, item=self._open.item("in_progress", []))
        yield self._written(ResponseContentPartAddedEvent, {"part": self._open.part})

    def _end(self, status: Status) -> Iterator[Event]:
        """Nothing, if no item is open."""
        if self._open is None:
            return
        yield self._written(*self._open.done())
        yield self._written(ResponseContentPartDoneEvent, {"part": self._open.part})
        item = self._open.item(status, [self._open.part])
        yield self._event(ResponseOutputItemDoneEvent, item=item)
        self._ended.append(item)
        self._open = None

    def _call(self, call_id: str, name: str, arguments: str) -> Iterator[Event]:
        fields = {"id": new_id("fc_"), "type": "function_call", "call_id": call_id, "name": name}
        began = ResponseFunctionToolCall(**fields, arguments="", status="in_progress")
        yield self._event(ResponseOutputItemAddedEvent, item=began)
        yield self._event(ResponseFunctionCallArgumentsDeltaEvent, item_id=began.id, delta=arguments)
        yield self._event(ResponseFunctionCallArgumentsDoneEvent, item_id=began.id, arguments=arguments)
        item = ResponseFunctionToolCall(**fields, arguments=arguments, status="completed")
        yield self._event(ResponseOutputItemDoneEvent, item=item)
        self._ended.append(item)

    def _written(self, kind: type[BaseModel], fields: Mapping[str, Any]) -> Event:
        """An event of the open item's only part."""
        return self._event(kind, item_id=self._open.id, content_index=0, **fields)

    def _event(self, kind: type[BaseModel], **fields: Any) -> Event:
        return self._events.make(kind, output_index=len(self._ended), **fields)


def _whole(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion's entry; its bytes, which may not be null here, are empty where a token does not say them."""
    return _with_bytes(entry) | {"top_logprobs": [_with_bytes(top) for top in entry["top_logprobs"]]}


def _with_bytes(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**entry, "bytes": entry["bytes"] or []}


def _short(entry: Mapping[str, Any]) -> dict[str, Any]:
    """As in the events, which have no bytes."""
    tops = [{"token": top["token"], "logprob": top["logprob"]} for top in entry["top_logprobs"]]
    return {"token": entry["token"], "logprob": entry["logprob"], "top_logprobs": tops}
