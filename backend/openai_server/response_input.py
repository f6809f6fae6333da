"""The input of a response: its items, and the messages of the chat that they are.

| item                   | in the chat                                                                            |
|------------------------|----------------------------------------------------------------------------------------|
| a text                 | a message of the user                                                                  |
| `message`, or no type  | a message; parts `input_text` and `output_text` are text, `input_image` is `image_url` |
| `reasoning`            | `reasoning_content` of the assistant's message that it begins; nothing without text    |
| `function_call`        | one of the `tool_calls` of the assistant's message                                     |
| `function_call_output` | a message of the tool                                                                  |

What the assistant said in a row is one message, as far as a message can hold it: a thought, then content, then calls.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from backend.validation import Record


class InputText(Record):
    type: Literal["input_text"]
    text: str


class OutputText(Record):
    type: Literal["output_text"]
    text: str


class InputImage(Record):
    """image_url: a data URL, or where the image is."""

    type: Literal["input_image"]
    image_url: str


Text = InputText | OutputText


class InputMessage(Record):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Annotated[Text | InputImage, Field(discriminator="type")]]


class FunctionCallItem(Record):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(Record):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Annotated[Text, Field(discriminator="type")]]


class ReasoningText(Record):
    type: Literal["reasoning_text"]
    text: str


class PlainText(Record):
    """How some clients send a thought back."""

    type: Literal["text"]
    text: str


class ReasoningItem(Record):
    type: Literal["reasoning"]
    content: list[Annotated[ReasoningText | PlainText, Field(discriminator="type")]] | None = None


def _no_reference(item: Any) -> Any:
    """A client that sends a reference takes its items for stored, as they are at OpenAI unless `store` is false."""
    if isinstance(item, Mapping) and item.get("type") == "item_reference":
        raise PydanticCustomError("item_reference", "the item itself, for nothing is stored; set the client's store to false")
    return item


Item = Annotated[
    InputMessage | FunctionCallItem | FunctionCallOutputItem | ReasoningItem,
    BeforeValidator(_no_reference),
]
Input = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Item], Tag("items")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "items"),
]


def chat_messages(given: str | Sequence[Mapping[str, Any]], instructions: str | None) -> tuple[list[dict], dict[str, str]]:
    """The messages, and their names → those of what the client sent. given: an `Input`, checked, as it came."""
    chat = _Chat()
    if instructions:
        chat.add({"role": "system", "content": instructions}, "instructions")
    if isinstance(given, str):
        chat.add({"role": "user", "content": given}, "input")
    else:
        for index, item in enumerate(given):
            chat.take(item, f"input[{index}]")
    return chat.messages, chat.names


class _Chat:
    """names: of each message, and of what in it the client has elsewhere → the client's."""

    def __init__(self):
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}

    def add(self, message: dict[str, Any], name: str) -> None:
        self.names[f"messages[{len(self.messages)}]"] = name
        self.messages.append(message)

    def take(self, item: Mapping[str, Any], name: str) -> None:
        """name: the item's, as the client has it."""
        match item.get("type", "message"):
            case "reasoning":
                if text := "".join(part["text"] for part in item.get("content") or ()):
                    turn = self._turn(name, without=("content", "tool_calls"))
                    turn["reasoning_content"] = turn.get("reasoning_content", "") + text
            case "function_call":
                calls = self._turn(name).setdefault("tool_calls", [])
                self.names[f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}].function"] = name
                function = {"name": item["name"], "arguments": item["arguments"]}
                calls.append({"id": item["call_id"], "type": "function", "function": function})
            case "function_call_output":
                self.names[f"messages[{len(self.messages)}].tool_call_id"] = f"{name}.call_id"
                self.add({"role": "tool", "tool_call_id": item["call_id"], "content": _content(item["output"])}, name)
            case _ if item["role"] == "assistant":
                self._turn(name, without=("content", "tool_calls"))["content"] = _content(item["content"])
            case _:
                self.add({"role": item["role"], "content": _content(item["content"])}, name)

    def _turn(self, name: str, *, without: Sequence[str] = ()) -> dict[str, Any]:
        """The assistant's message that goes on, or a new one if there is none or it has one of these already."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant" or any(each in last for each in without):
            self.add({"role": "assistant"}, name)
        return self.messages[-1]


def _content(given: str | Sequence[Mapping[str, Any]]) -> str | list[dict[str, Any]]:
    return given if isinstance(given, str) else [_part(part) for part in given]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "input_image":
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    return {"type": "text", "text": part["text"]}
