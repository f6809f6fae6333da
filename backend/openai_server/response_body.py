"""The body of a request for a response: OpenAI's type, narrowed to what this server has."""

from typing import Annotated, Any, Literal

from openai.types.responses.response_create_params import ResponseCreateParamsBase as ResponseParams
from openai.types.responses.response_text_config_param import ResponseTextConfigParam
from openai.types.shared_params import Reasoning
from pydantic import Discriminator, Field, Tag, TypeAdapter, with_config
from typing_extensions import Required

from backend.openai_server.response_input import Input
from backend.validation import Record

LOGPROBS = "message.output_text.logprobs"


class ReasoningOptions(Reasoning, total=False):
    """The chat template decides which thoughts the model sees again, and there is one mode."""

    context: Literal["auto"] | None
    mode: Literal["standard"] | None


class FunctionTool(Record):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(Record):
    type: Literal["function"]
    name: str


class ChosenTools(Record):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenFunction]


ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("word")]
    | Annotated[Annotated[ChosenFunction | ChosenTools, Field(discriminator="type")], Tag("object")],
    Discriminator(lambda value: "object" if isinstance(value, dict) else "word"),
]


@with_config(strict=True)
class ResponseBody(ResponseParams, total=False):
    """OpenAI's parameters of a response, and what else is read before the model; the model reads the rest."""

    model: Required[str]
    input: Required[Input]
    include: list[Literal[LOGPROBS, "reasoning.encrypted_content"]]
    reasoning: ReasoningOptions
    text: ResponseTextConfigParam
    tools: list[FunctionTool]
    tool_choice: ToolChoice
    n: Literal[1]
    stream: bool | None
    chat_template_kwargs: dict[str, Any] | None


RESPONSE = TypeAdapter(ResponseBody)
