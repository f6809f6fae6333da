"""HTTP bodies → checked parameters, by the `openai` package's own types, and their place in the OpenAPI document."""

from typing import Any

from fastapi import Request
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from pydantic import TypeAdapter, with_config
from starlette.requests import ClientDisconnect

from backend.errors import RequestError
from backend.json_text import read_json
from backend.openai_server.errors import ApiError, bad_request, client_gone, unknown_model
from backend.openai_server.settings import OpenAISettings
from backend.parameters import shown, shown_json
from backend.validation import checked


@with_config(strict=True)
class ChatBody(ChatParams, total=False):
    """OpenAI's parameters of a chat completion, and what else is read before the model; the model reads the rest."""

    stream: bool | None
    logit_bias: dict[str, float] | None  # integers at OpenAI, numbers for the model
    chat_template_kwargs: dict[str, Any] | None


@with_config(strict=True)
class CompletionBody(CompletionParams, total=False):
    stream: bool | None
    logit_bias: dict[str, float] | None


CHAT = TypeAdapter(ChatBody)
COMPLETION = TypeAdapter(CompletionBody)
# Parameters that are several options, and those of them that are such again.
_OPTIONS = {"reasoning": (), "response_format": ("json_schema",), "stream_options": (), "text": ("format",)}


async def read_body(request: Request, adapter: TypeAdapter, settings: OpenAISettings) -> dict[str, Any]:
    """The body as it came, without what is null (see `_without_nulls`), if it is right as far as OpenAI's types say.

    Raises:
        ApiError: 413 for one that is too large, 404 for another model, 499 for a client that goes before all has come, 400 for
            what else is wrong.
    """
    sent = await _limited(request, settings.max_body_bytes)
    try:
        body = read_json(sent.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        got = f"bytes that are not UTF-8 (at byte {error.start})"
        raise bad_request(f"body: got {got}, expected a JSON object in UTF-8") from None
    except ValueError as error:
        raise bad_request(f"body: got {error}, expected a JSON object") from None
    if not isinstance(body, dict):
        raise bad_request(f"body: got {shown_json(body)}, expected a JSON object")
    body = _without_nulls(body)
    try:
        checked("body", adapter, body)
    except RequestError as error:
        raise bad_request(str(error).replace("body.", "", 1)) from None
    if body["model"] != settings.served_name:
        raise unknown_model(body["model"], settings.served_name)
    copies = body.get("n", 1)  # every choice is a request of its own to the model
    if copies * len(sent) > settings.max_body_bytes:
        got = f"{shown(copies)} choices of {len(sent)} bytes"
        raise bad_request(f"n: got {got}, expected at most {settings.max_body_bytes} bytes in all; send several requests")
    return body


def _without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """Many clients write out all of a record, with null for what they leave open: parameters, their options, and items of a
    response's input. A schema keeps its nulls, and what else the model reads."""
    body = _not_null(body)
    for name, within in _OPTIONS.items():
        if name in body:
            body[name] = options = _not_null(body[name])
            for each in within:
                if isinstance(options, dict) and each in options:
                    options[each] = _not_null(options[each])
    if isinstance(body.get("input"), list):
        body["input"] = [_not_null(item) for item in body["input"]]
    return body


def _not_null(value: Any) -> Any:
    """An object without its keys that are null; anything else as it is."""
    return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


async def _limited(request: Request, max_bytes: int) -> bytes:
    """The body; what is longer is not kept, whatever length the client says."""
    received = bytearray()
    try:
        async for piece in request.stream():
            received += piece
            if len(received) > max_bytes:
                got = f"more than {max_bytes} bytes"
                raise ApiError(413, f"body: got {got}, expected at most these; send fewer or smaller images")
    except ClientDisconnect:
        raise client_gone() from None
    return bytes(received)


def body_schema(adapter: TypeAdapter, served_name: str, prefix: str) -> tuple[dict, dict]:
    """The body in the OpenAPI document, and the components that it refers to. prefix: of their names, which several routes have
    for different things."""
    schema = adapter.json_schema(ref_template=f"#/components/schemas/{prefix}.{{model}}")
    components = {f"{prefix}.{name}": each for name, each in schema.pop("$defs", {}).items()}
    schema["properties"]["model"] = {"const": served_name}
    return schema, components
