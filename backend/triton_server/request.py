"""One inference request of Triton server → one `GenerationRequest`.

| input                   | dtype, shape | meaning                                                                         |
|-------------------------|--------------|---------------------------------------------------------------------------------|
| text_input              | STRING [1]   | the prompt as it is, no chat template                                           |
| messages                | STRING [1]   | a JSON list of chat messages, OpenAI's form; the chat template makes the prompt |
| input_ids               | INT32 [-1]   | the prompt as token ids; exactly one of text_input, messages and input_ids      |
| image                   | STRING [-1]  | images, each in base64, as a data URL or as a URL; in order, for the messages'  |
|                         |              | parts of type image, or for the image placeholders in text_input or input_ids   |
| tools                   | STRING [1]   | with messages: a JSON list of tools, OpenAI's form                              |
| tool_choice             | STRING [1]   | with tools: auto (the default), none, required, or an object of OpenAI's form   |
| parallel_tool_calls     | BOOL [1]     | with messages: false ends the answer with its first call (default true)         |
| chat_template_kwargs    | STRING [1]   | with messages: a JSON object of variables for the template, enable_thinking ... |
| stream                  | BOOL [1]     | one response a canvas (true) or one response in all (false, the default)        |
| return_drafts           | BOOL [1]     | with stream: responses with draft_text between those with text (default false)  |
| sampling_parameters     | STRING [1]   | a JSON object, keys as in `SamplingConfig`                                      |
| max_tokens              | INT32 [1]    | `SamplingConfig.max_tokens`                                                     |
| temperature             | FP32 [1]     | `SamplingConfig.temperature`                                                    |
| top_k                   | INT32 [1]    | `SamplingConfig.top_k`                                                          |
| top_p                   | FP32 [1]     | `SamplingConfig.top_p`                                                          |
| seed                    | UINT64 [1]   | `SamplingConfig.seed`                                                           |
| stop_words              | STRING [-1]  | `SamplingConfig.stop`                                                           |
| return_logprobs         | BOOL [1]     | `SamplingConfig.logprobs`                                                       |
| exclude_input_in_output | BOOL [1]     | false: the first response opens with the prompt in the form it came in,         |
|                         |              | text_input before text_output, input_ids before output_ids (default true)       |
| num_choices             | INT32 [1]    | this request is one of so many that are wanted all at once (default 1)          |
| return_finish_reason, return_num_input_tokens,   | BOOL [1] | false: responses come without that output (default true)   |
| return_num_output_tokens                         |          |                                                            |

A sampling parameter is taken from its own tensor, else from sampling_parameters, else from the request's parameters, else
from the checkpoint. The request's parameters are also where `/generate` puts JSON keys that are not inputs.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from backend.chat.answer import AnswerFormat
from backend.chat.messages import chat_request, placed_images
from backend.chat.template import ChatTemplate
from backend.errors import refused
from backend.json_text import parse_json_object, parsed_json
from backend.parameters import shown
from backend.sampling_config import SamplingConfig, canonical


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What one client asks for. answer: how to read a chat's answer; None for a prompt that is no chat, whose text comes as it
    is. images: in base64 or URLs, one for each placeholder of the prompt. drafts: canvases that are not finished are sent too.
    omitted: outputs that the client does not want. num_choices: requests, this one among them, that are wanted all at once.
    timeout_s runs from the moment the request reaches the model."""

    request_id: str
    prompt: str | list[int]
    images: tuple[str, ...] = ()
    sampling: SamplingConfig
    answer: AnswerFormat | None = None
    stream: bool = False
    drafts: bool = False
    echo_prompt: bool = False
    omitted: frozenset[str] = frozenset()
    num_choices: int = 1
    timeout_s: float | None = None


class InferenceTensor(Protocol):
    """The part of `pb_utils.Tensor` that is read here."""

    def name(self) -> str: ...
    def as_numpy(self) -> np.ndarray: ...


class InferenceRequest(Protocol):
    """The part of `pb_utils.InferenceRequest` that every release has. Later ones add parameters() and timeout()."""

    def inputs(self) -> Iterable[InferenceTensor]: ...
    def request_id(self) -> str: ...


def parse_request(
    request: InferenceRequest, template: ChatTemplate | None = None, default_max_tokens: int = 0
) -> GenerationRequest:
    """Reads every input and parameter of a request. Raises RequestError INVALID_ARGUMENT with one line.

    default_max_tokens: for a request that does not say it; 0 leaves it to the checkpoint."""
    values = {tensor.name(): READERS[tensor.name()](tensor.name(), tensor.as_numpy()) for tensor in request.inputs()}
    parameters, timeout_s = _request_parameters(request)
    tensors = {_SAMPLING_KEYS[name]: value for name, value in values.items() if name in _SAMPLING_KEYS}
    usual = {"max_tokens": default_max_tokens or None}
    sampling = SamplingConfig.from_mapping(
        {**usual, **canonical(parameters), **canonical(values.get("sampling_parameters", {})), **tensors}
    )
    prompt, answer, images = _prompt(values, template, sampling)
    if values.get("return_drafts") and not values.get("stream"):
        raise refused("return_drafts: got true without stream; set stream to true")
    return GenerationRequest(
        request_id=request.request_id(),
        prompt=prompt,
        images=images,
        sampling=answer.sampling(sampling) if answer else sampling,
        answer=answer,
        stream=values.get("stream", False),
        drafts=values.get("return_drafts", False),
        echo_prompt=not values.get("exclude_input_in_output", True),
        omitted=frozenset(output for name, output in _RETURNED.items() if not values.get(name, True)),
        num_choices=values.get("num_choices", 1),
        timeout_s=timeout_s,
    )


def _prompt(
    values: Mapping[str, Any], template: ChatTemplate | None, sampling: SamplingConfig
) -> tuple[str | list[int], AnswerFormat | None, tuple[str, ...]]:
    """The prompt, how to read its answer, and its images."""
    given = [name for name in _PROMPTS if name in values]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise refused(f"prompt: got {got}, expected exactly one of the inputs {', '.join(_PROMPTS)}")
    if given != ["messages"]:
        _refuse_without_messages([name for name in _OF_CHATS if name in values])
        return values[given[0]], None, tuple(values.get("image", ()))
    if not values.get("exclude_input_in_output", True):
        raise refused("exclude_input_in_output: got false with messages, expected true; a chat is not echoed")
    if template is None:
        raise refused("messages: this model has no chat template; send text_input or input_ids")
    parts = (values.get(name) for name in ("messages", "tools", "tool_choice", "chat_template_kwargs"))
    asked = chat_request(*parts, values.get("parallel_tool_calls", True))
    chat = template.prompt(asked, keep_special_tokens=not sampling.skip_special_tokens)
    return chat.text, chat.form, tuple(placed_images(asked, values.get("image", ())))


def _refuse_without_messages(names: list[str]) -> None:
    if names:
        raise refused(f"{', '.join(names)}: given without messages; send messages, or remove it")


def _request_parameters(request: InferenceRequest) -> tuple[dict[str, Any], float | None]:
    """The client's own parameters, and the time-out, which gRPC sends apart and `/generate` as a parameter. Both in us."""
    parameters = json.loads(request.parameters()) if hasattr(request, "parameters") else {}
    parameters = {name: value for name, value in parameters.items() if not name.startswith("triton_")}
    parameters.pop("id", None)  # `/generate` leaves the request's id among the parameters
    timeout = parameters.pop("timeout", 0)
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
        got = shown(timeout)
        raise refused(f"timeout: got {got}, expected a whole number of microseconds, 0 for no limit")
    timeout = timeout or (request.timeout() if hasattr(request, "timeout") else 0)
    return parameters, timeout / 1e6 if timeout else None


def _string(name: str, array: np.ndarray) -> str:
    return _strings(name, array)[0]


def _strings(name: str, array: np.ndarray) -> list[str]:
    try:
        return [item.decode() for item in array.reshape(-1)]
    except UnicodeDecodeError as error:
        bad = error.object[error.start : error.start + 1]
        problem = f"got bytes that are not UTF-8 ({bad!r} at byte {error.start})"
        raise refused(f"{name}: {problem}; send the text encoded as UTF-8") from None


def _json(name: str, array: np.ndarray) -> dict[str, Any]:
    return parse_json_object(name, _string(name, array))


def _json_list(name: str, array: np.ndarray) -> list:
    return parsed_json(name, _string(name, array), list, "a JSON list of objects")


def _tool_choice(name: str, array: np.ndarray) -> str | dict[str, Any]:
    text = _string(name, array)
    if text in ('"auto"', '"none"', '"required"'):  # as JSON
        return text.strip('"')
    return parse_json_object(name, text) if text.lstrip().startswith("{") else text


def _integers(name: str, array: np.ndarray) -> list[int]:
    return array.reshape(-1).tolist()


def _scalar(name: str, array: np.ndarray) -> bool | int:
    return array.reshape(-1)[0].item()


def _decimal(name: str, array: np.ndarray) -> float:
    # The shortest decimal of this float32: 0.8 as a tensor and 0.8 in JSON must be the same temperature.
    return float(str(array.reshape(-1)[0]))


READERS: dict[str, Callable[[str, np.ndarray], Any]] = {
    "text_input": _string,
    "messages": _json_list,
    "input_ids": _integers,
    "image": _strings,
    "tools": _json_list,
    "tool_choice": _tool_choice,
    "parallel_tool_calls": _scalar,
    "chat_template_kwargs": _json,
    "stream": _scalar,
    "return_drafts": _scalar,
    "sampling_parameters": _json,
    "max_tokens": _scalar,
    "temperature": _decimal,
    "top_k": _scalar,
    "top_p": _decimal,
    "seed": _scalar,
    "stop_words": _strings,
    "return_logprobs": _scalar,
    "return_finish_reason": _scalar,
    "return_num_input_tokens": _scalar,
    "return_num_output_tokens": _scalar,
    "exclude_input_in_output": _scalar,
    "num_choices": _scalar,
}

_PROMPTS = ("text_input", "messages", "input_ids")
_OF_CHATS = ("tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs")
_SAMPLING_KEYS = {name: name for name in ("max_tokens", "temperature", "top_k", "top_p", "seed")} | {
    "stop_words": "stop",
    "return_logprobs": "logprobs",
}
# Input → the output that it asks for.
_RETURNED = {f"return_{name}": name for name in ("finish_reason", "num_input_tokens", "num_output_tokens")}
