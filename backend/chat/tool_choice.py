"""Which tools a chat's answer may call, and whether it must: `tools` and `tool_choice` in the OpenAI form."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter

from backend.errors import refused
from backend.parameters import shown
from backend.validation import Record, checked


class FunctionDefinition(Record):
    name: str = Field(pattern=r"^[^\s{}]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Record):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Record):
    name: str


class NamedToolChoice(Record):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Record):
    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice]


class AllowedToolsChoice(Record):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


_ToolChoiceObject = Annotated[NamedToolChoice | AllowedToolsChoice, Field(discriminator="type")]
_TOOLS = TypeAdapter(list[Tool])
_TOOL_CHOICE = TypeAdapter(
    Annotated[
        Annotated[Literal["auto", "none", "required"], Tag("word")] | Annotated[_ToolChoiceObject, Tag("object")],
        Discriminator(lambda value: "object" if isinstance(value, dict) else "word"),
    ]
)


def allowed_tools(tools: object, tool_choice: object) -> tuple[list[Mapping[str, Any]], str]:
    """Of the tools as they came those that may be called, and what must be: "" nothing, "*" any of them, or a tool's name. One
    tool that must be called is named. None: not given.

    Raises RequestError INVALID_ARGUMENT.
    """
    offered = checked("tools", _TOOLS, tools) if tools is not None else []
    choice = checked("tool_choice", _TOOL_CHOICE, tool_choice) if tool_choice is not None else "auto"
    names = [tool.function.name for tool in offered]
    if len(set(names)) < len(names):
        place, name = next(each for each in enumerate(names) if each[1] in names[: each[0]])
        raise refused(f"tools[{place}].function.name: got {shown(name)} again, expected another name than those before")
    if isinstance(choice, AllowedToolsChoice):
        names, choice = _listed(choice.allowed_tools, names), choice.allowed_tools.mode
    required = ""
    if isinstance(choice, NamedToolChoice):
        required = choice.function.name
        if required not in names:
            raise refused(f"tool_choice: got the function {shown(required)}, expected one of tools, {names}")
    elif choice == "required":
        if not names:
            raise refused("tool_choice: got 'required' without tools, expected at least one; send tools")
        required = names[0] if len(names) == 1 else "*"
    return [tool for tool in tools or [] if choice != "none" and tool["function"]["name"] in names], required


def _listed(allowed: AllowedTools, names: Sequence[str]) -> list[str]:
    """Those of `names`, the request's tools."""
    chosen = [tool.function.name for tool in allowed.tools]
    unknown = [name for name in chosen if name not in names]
    if unknown or not chosen:
        got = f"the functions {shown(unknown)}" if unknown else "an empty list"
        raise refused(f"tool_choice.allowed_tools.tools: got {got}, expected some of tools, {list(names)}")
    return [name for name in names if name in chosen]
