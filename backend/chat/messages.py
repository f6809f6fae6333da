"""What messages, tools and a tool choice may be: the OpenAI form, checked, and made ready for a chat template.

Everything that is refused raises RequestError INVALID_ARGUMENT, one line: where, got, expected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from backend.errors import refused
from backend.json_text import read_json
from backend.parameters import shown, shown_json

T = TypeVar("T")


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)  # clients send back what they got: refusal, annotations …


class TextPart(_Record):
    type: Literal["text"]
    text: str


class ImagePart(_Record):
    """The place of an image that is given apart from the messages."""

    type: Literal["image"]


class ImageUrl(_Record):
    """url: a data URL, or where the image is. `detail`, which OpenAI's API has beside it, changes nothing here."""

    url: str


class ImageUrlPart(_Record):
    type: Literal["image_url"]
    image_url: ImageUrl


Content = str | list[Annotated[TextPart | ImagePart | ImageUrlPart, Field(discriminator="type")]]


class SystemMessage(_Record):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(_Record):
    role: Literal["user"]
    content: Content


class CalledFunction(_Record):
    name: str
    arguments: str | dict[str, Any]  # a JSON object, as text or parsed


class MessageToolCall(_Record):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(_Record):
    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None


class ToolMessage(_Record):
    """The result of a call, named by `tool_call_id` or by the function's `name`."""

    role: Literal["tool"]
    content: str | list[TextPart] | dict[str, Any]
    tool_call_id: str | None = None
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class FunctionDefinition(_Record):
    name: str = Field(pattern=r"^[^\s{}]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Record):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(_Record):
    name: str


class NamedToolChoice(_Record):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(_Record):
    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice]


class AllowedToolsChoice(_Record):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


_ToolChoiceObject = Annotated[NamedToolChoice | AllowedToolsChoice, Field(discriminator="type")]
_MESSAGES = TypeAdapter(list[Message])
_TOOLS = TypeAdapter(list[Tool])
_TOOL_CHOICE = TypeAdapter(
    Annotated[
        Annotated[Literal["auto", "none", "required"], Tag("word")] | Annotated[_ToolChoiceObject, Tag("object")],
        Discriminator(lambda value: "object" if isinstance(value, dict) else "word"),
    ]
)


# Where pydantic's own word is of Python, not of JSON.
_EXPECTED = {
    "dict_type": "a JSON object",
    "model_attributes_type": "a JSON object",
    "model_type": "a JSON object",
    "list_type": "a list",
    "iterable_type": "a list",
    "none_required": "null",
}


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
    offered = checked("tools", _TOOLS, tools) if tools is not None else []
    choice = checked("tool_choice", _TOOL_CHOICE, tool_choice) if tool_choice is not None else "auto"
    names = [tool.function.name for tool in offered]
    if len(set(names)) < len(names):
        place, name = next(each for each in enumerate(names) if each[1] in names[: each[0]])
        raise refused(f"tools[{place}].function.name: got {shown(name)} again, expected another name than those before")
    if isinstance(choice, AllowedToolsChoice):
        names, choice = _allowed(choice.allowed_tools, names), choice.allowed_tools.mode
    required = ""
    if isinstance(choice, NamedToolChoice):
        required = choice.function.name
        if required not in names:
            raise refused(f"tool_choice: got the function {shown(required)}, expected one of tools, {names}")
    elif choice == "required":
        if not names:
            raise refused("tool_choice: got 'required' without tools, expected at least one; send tools")
        required = names[0] if len(names) == 1 else "*"
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
        tools=[tool for tool in tools or [] if choice != "none" and tool["function"]["name"] in names],
        required_tool=required,
        one_call=not parallel_tool_calls,
        template_kwargs=dict(template_kwargs or {}),
    )


def _allowed(allowed: AllowedTools, names: list[str]) -> list[str]:
    """Those of `names`, the request's tools."""
    chosen = [tool.function.name for tool in allowed.tools]
    unknown = [name for name in chosen if name not in names]
    if unknown or not chosen:
        got = f"the functions {shown(unknown)}" if unknown else "an empty list"
        raise refused(f"tool_choice.allowed_tools.tools: got {got}, expected some of tools, {names}")
    return [name for name in names if name in chosen]


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


def _arguments(where: str, arguments: str | dict[str, Any]) -> dict[str, Any]:
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


def checked(name: str, adapter: TypeAdapter[T], value: object) -> T:
    """`value` as `adapter` reads it; `name` is what messages call it."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise refused(_line(name, value, error)) from None


def _line(name: str, value: object, error: ValidationError) -> str:
    """What is wrong with `value`. Of the errors of alternatives, the one deepest in the data is about what was meant, of those
    that do not say another `type`."""
    errors = error.errors(include_url=False)
    others = {each["loc"][:-1]: each for each in errors if each["loc"][-1:] == ("type",) and each["type"] == "literal_error"}
    meant = [each for each in errors if not any(each["loc"][: len(place)] == place for place in others)]
    deepest = max(meant or errors, key=lambda each: len(each["loc"]))
    if not meant and len({place[:-1] for place in others}) == 1:  # one value, which is none of several
        deepest["ctx"] = {"expected": " or ".join(each["ctx"]["expected"] for each in others.values())}
        deepest["msg"] = f"Input should be {deepest['ctx']['expected']}"
    where, got = name, value
    for step in deepest["loc"]:  # steps that are not in the data are pydantic's names of the alternatives
        if isinstance(step, int) and isinstance(got, list) and step < len(got):
            where, got = f"{where}[{step}]", got[step]
        elif isinstance(step, str) and isinstance(got, dict) and step in got:
            where, got = f"{where}.{step}", got[step]
    kind, message, context = deepest["type"], deepest["msg"], deepest.get("ctx", {})
    if kind in ("missing", "union_tag_not_found"):
        key = context["discriminator"].strip("'") if context else deepest["loc"][-1]
        return f"{where}.{key}: got nothing, expected a value; add it"
    if kind == "union_tag_invalid":
        key = context["discriminator"].strip("'")
        return f"{where}.{key}: got {shown(context['tag'])}, expected one of {context['expected_tags']}"
    message = _EXPECTED.get(kind, message)
    expected = message.removeprefix("Input should be ").removeprefix("a valid ")
    return f"{where}: got {shown_json(got)}, expected {expected[:1].lower()}{expected[1:]}"
