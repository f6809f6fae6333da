"""A request for a response → the request for a chat completion that asks for the same.

What both have goes over as it is, and so do the parameters that OpenAI's responses have not, the model's own: what they may be,
chat completions say.
"""

from collections.abc import Mapping
from typing import Any

from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase as ResponseParams
from openai.types.responses.response_text_config_param import ResponseTextConfigParam

from backend.openai_server.errors import bad_request
from backend.openai_server.parameters import refuse_missing
from backend.openai_server.response_body import LOGPROBS, ReasoningOptions
from backend.openai_server.response_input import chat_messages
from backend.parameters import shown, shown_json

# Of responses alone: read below, or without effect.
_READ = {"include", "input", "instructions", "max_output_tokens", "max_tool_calls", "reasoning", "text"}
_NEUTRAL = {"background": False, "truncation": "disabled"}
_SEND_ALL = "send the conversation's items in input"
_REMEDIES = {
    "conversation": _SEND_ALL,
    "previous_response_id": _SEND_ALL,
    "prompt": "send its text in instructions and input",
}
# Chat completions' names of what responses have, under which it is refused here.
_NAMES = {
    "logprobs": "include",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
}
_NAMES_WITHIN = {
    "prompt": "input",  # the model's name of what the messages make
    "response_format.json_schema": "text.format",
    "tool_choice.allowed_tools": "tool_choice",
}


def chat_body(body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The body of the chat completion, and its names of parameters → those of the response, where they differ.

    body: a `ResponseBody`, checked, without what is null. Raises ApiError 400 for what is refused by the name that it has here.
    """
    for name in body:
        if name in _NAMES:
            raise bad_request(f"{name}: got {shown_json(body[name])}, but a response has {_NAMES[name]}; send that")
    here_alone = set(ResponseParams.__annotations__) - set(ChatParams.__annotations__)
    refuse_missing(body, here_alone - _READ, _NEUTRAL, _REMEDIES)
    reasoning, text = _options(body, "reasoning", ReasoningOptions), _options(body, "text", ResponseTextConfigParam)
    chat = {name: value for name, value in body.items() if name not in here_alone}
    chat["messages"], names = chat_messages(body["input"], body.get("instructions"))
    if "max_output_tokens" in body:
        chat["max_tokens"] = body["max_output_tokens"]
    if "effort" in reasoning:
        chat["reasoning_effort"] = reasoning["effort"]
    if "verbosity" in text:
        chat["verbosity"] = text["verbosity"]
    if "format" in text:
        chat["response_format"] = _response_format(text["format"])
    if LOGPROBS in body.get("include", ()):
        chat["logprobs"] = True
    elif body.get("top_logprobs"):
        raise bad_request(f"top_logprobs: got {body['top_logprobs']}, expected {LOGPROBS!r} in include; add it")
    if "tools" in body:
        chat["tools"] = [_tool(tool) for tool in body["tools"]]
        names |= {f"tools[{index}].function": f"tools[{index}]" for index in range(len(chat["tools"]))}
    if "tool_choice" in body:
        chat["tool_choice"] = _tool_choice(body["tool_choice"])
    return chat, _NAMES | _NAMES_WITHIN | names


def _options(body: Mapping[str, Any], name: str, kind: type) -> dict[str, Any]:
    """What a parameter says that is several. kind: its type."""
    given, known = body.get(name, {}), kind.__annotations__
    for each in given:
        if each not in known:
            raise bad_request(f"{name}: got the key {shown(each)}, expected some of {', '.join(sorted(known))}; remove it")
    return given


def _response_format(form: Mapping[str, Any]) -> Mapping[str, Any]:
    if form["type"] != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(choice: str | Mapping[str, Any]) -> str | dict[str, Any]:
    if isinstance(choice, str):
        return choice
    if choice["type"] == "function":
        return _tool(choice)
    return {
        "type": "allowed_tools",
        "allowed_tools": {"mode": choice["mode"], "tools": [_tool(each) for each in choice["tools"]]},
    }
