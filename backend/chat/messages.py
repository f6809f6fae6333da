"""What the messages of a chat may be: the OpenAI form, checked, and made ready for a chat template.

Everything that is refused raises RequestError INVALID_ARGUMENT, one line: where, got, expected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter

from backend.chat.tool_choice import allowed_tools
from backend.errors import refused
from backend.json_text import read_json
from backend.parameters import shown, shown_json
from backend.validation import Record, checked

T = TypeVar("T")


class TextPart(Record):
    type: Literal["text"]
    text: str


class ImagePart(Record):
    """The place of an image that is given apart from the messages."""

    type: Literal["image"]


class ImageUrl(Record):
    """url: a data URL, or where the image is. `detail`, which OpenAI's API has beside it, changes nothing here."""

    url: str


class ImageUrlPart(Record):
    type: Literal["image_url"]
    image_url: ImageUrl


Content = str | list[Annotated[TextPart | ImagePart | ImageUrlPart, Field(discriminator="type")]]


class SystemMessage(Record):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Record):
    role: Literal["user"]
    content: Content


class CalledFunction(Record):
    name: str
    arguments: str | dict[str, Any] | None  # a JSON object, as text or parsed; null is without any


class MessageToolCall(Record):
    id: str | None = None
    type: Literal["function"] | None = "function"
    function: CalledFunction


class AssistantMessage(Record):
    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None


class ToolMessage(Record):
    """The result of a call, named by `tool_call_id` or by the function's `name`."""

    role: Literal["tool"]
    content: str | list[TextPart] | dict[str, Any]
    tool_call_id: str | None = None
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
_MESSAGES = TypeAdapter(list[Message])


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A chat to go on with. messages, tools: as the template takes them. required_tool: "" if the model is free to call a tool
    or not, "*" if it must call some tool, else the name of the one it must call. one_call: the answer ends with its first call.
    images: one for each place that the messages have for an image, in order: its URL, or None for one that is given apart."""

    messages: Sequence[Mapping[str, Any]]
    images: Sequence[str | None] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    required_tool: str = ""
    one_call: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def chat_request(
    messages: object,
    tools: object = None,
    tool_choice: object = None,
    template_kwargs: Mapping[str, Any] | None = None,
    parallel_tool_calls: bool = True,
) -> ChatRequest:
    """Checks the parts of a chat, parsed from JSON; None is a part that was not given.

    The model is not told of tools that tool_choice does not allow, with "none" of any; one tool that must be called is named.
    With parallel_tool_calls false the answer has one call at most.
    """
    if not isinstance(messages, list | tuple):
        raise refused(f"messages: got a value of type {type(messages).__name__}, expected a list of messages")
    if not messages:
        raise refused("messages: got an empty list, expected at least one message")
    listed = checked("messages", _MESSAGES, messages)
    allowed, required = allowed_tools(tools, tool_choice)
    if not isinstance(template_kwargs or {}, Mapping):
        raise refused(f"chat_template_kwargs: got {shown(template_kwargs)}, expected an object of variables for the template")
    thinking = (template_kwargs or {}).get("enable_thinking", False)
    if not isinstance(thinking, bool):  # a template takes every text for true, "false" as well
        raise refused(f"chat_template_kwargs.enable_thinking: got {shown_json(thinking)}, expected true or false")
    return ChatRequest(
        messages=_for_template(listed, messages),
        images=[
            part.image_url.url if isinstance(part, ImageUrlPart) else None
            for message in listed
            for part in (message.content if isinstance(message.content, list) else ())
            if isinstance(part, ImagePart | ImageUrlPart)
        ],
        tools=allowed,
        required_tool=required,
        one_call=not parallel_tool_calls,
        template_kwargs=dict(template_kwargs or {}),
    )


def placed_images(chat: ChatRequest, given: Sequence[T]) -> list[str | T]:
    """The images of a chat in the order of their places: URLs from the messages, the others from `given`."""
    places = sum(url is None for url in chat.images)
    if places != len(given):
        raise refused(
            f"image: got {len(given)} images, expected {places}, one for each part of the messages of type image; "
            "images can also be sent as parts of type image_url"
        )
    remaining = iter(given)
    return [next(remaining) if url is None else url for url in chat.images]


def _for_template(listed: list[Message], given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as given, with what templates rely on: arguments parsed, tool results named, content never None, and of
    images their places alone."""
    names: dict[str, str] = {}  # of called functions, by the id of the call
    result = []
    for index, (message, source) in enumerate(zip(listed, given, strict=True)):
        ready = {name: value for name, value in source.items() if value is not None}
        if isinstance(message.content, list):
            ready["content"] = [
                {"type": "image"} if isinstance(part, ImagePart | ImageUrlPart) else given_part
                for part, given_part in zip(message.content, source["content"], strict=True)
            ]
        if isinstance(message, AssistantMessage):
            ready.setdefault("content", "")
            if message.tool_calls:
                where = f"messages[{index}].tool_calls"
                ready["tool_calls"] = [
                    {
                        "type": "function",
                        "function": {
                            "name": call.function.name,
                            "arguments": _arguments(f"{where}[{at}].function.arguments", call.function.arguments),
                        },
                    }
                    | ({"id": call.id} if call.id else {})
                    for at, call in enumerate(message.tool_calls)
                ]
                names |= {call.id: call.function.name for call in message.tool_calls if call.id}
        elif isinstance(message, ToolMessage) and message.name is None:
            if message.tool_call_id not in names:
                raise refused(
                    f"messages[{index}].tool_call_id: got {shown_json(message.tool_call_id)}, "
                    "expected the id of a tool call in an earlier assistant message"
                )
            ready["name"] = names[message.tool_call_id]
        result.append(ready)
    return result


def _arguments(where: str, arguments: str | dict[str, Any] | None) -> dict[str, Any]:
    if isinstance(arguments, dict):
        return arguments
    expected = "expected the text of a JSON object"
    try:
        value = read_json(arguments or "{}")
    except ValueError as error:
        raise refused(f"{where}: got {error}: {shown(arguments)}; {expected}") from None
    if not isinstance(value, dict):
        raise refused(f"{where}: got {shown(arguments)}, {expected}")
    return value
