"""A request's parameters → inputs of the Triton model.

What OpenAI's API and the model both know goes to `sampling_parameters`, and so does every name that OpenAI's API does not have:
our own parameters, which the `openai` client sends with `extra_body`. The model checks them all and refuses what it does not
know by name.
"""

import json
import secrets
from collections.abc import Iterable, Mapping, Set
from types import MappingProxyType
from typing import Any

from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from backend.openai_server.errors import bad_request
from backend.parameters import NUMBERS, TOKEN_ID, Number, shown, shown_json

_SAMPLING = {
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "presence_penalty",
    "seed",
    "stop",
    "temperature",
    "top_logprobs",
    "top_p",
}
# Read below or by the front end itself.
_READ = {
    "best_of",
    "echo",
    "max_completion_tokens",
    "messages",
    "prompt",
    "reasoning_effort",
    "parallel_tool_calls",
    "response_format",
    "tool_choice",
    "tools",
}
_FRONT_END = {"model", "n", "stream", "stream_options"}
# They say something about the account, the cache or the tier: nothing about the answer.
_WITHOUT_EFFECT = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
}
# Values that ask for nothing, of parameters that nothing here has.
_NEUTRAL = {
    "function_call": "none",
    "functions": [],
    "modalities": ["text"],
    "store": False,
    "suffix": "",
    "verbosity": "medium",
}
_REMOVE: Mapping[str, str] = MappingProxyType({})
MAX_CHOICES = 128
_SEED = Number(kind=int, minimum=-(1 << 63), maximum=(1 << 64) - 1)  # OpenAI's have a sign, the model's have not


def chat_inputs(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs of every choice of a chat completion.

    reasoning_effort "none" and "minimal" stand for enable_thinking false, the others for true. Raises ApiError 400."""
    given = _given(body, ChatParams.__annotations__)
    if (echo := given.pop("echo", False)) is not False:
        raise bad_request(f"echo: got {shown_json(echo)}, but a chat is not echoed; remove it")
    if "max_completion_tokens" in given:
        tokens = given.pop("max_completion_tokens")
        if given.setdefault("max_tokens", tokens) != tokens:
            raise bad_request(f"max_tokens: got {given['max_tokens']}, but max_completion_tokens is {tokens}; remove one")
    structure = _structure(given.pop("response_format", None))
    if structure and given.setdefault("structured_outputs", structure) is not structure:
        raise bad_request("response_format and structured_outputs: both given, but each says what the answer is; remove one")
    effort = given.pop("reasoning_effort", None)
    kwargs = given.pop("chat_template_kwargs", {})
    if effort is not None:
        thinking = effort not in ("none", "minimal")
        kwargs = {"enable_thinking": thinking, **kwargs}
        if kwargs["enable_thinking"] is (not thinking):
            contrary = f"chat_template_kwargs.enable_thinking is {shown_json(not thinking)}"
            raise bad_request(f"reasoning_effort: got {shown_json(effort)}, but {contrary}; remove one")
    inputs = {"messages": _json(given.pop("messages"))}
    tools, choice = given.pop("tools", None), given.pop("tool_choice", None)
    parallel = given.pop("parallel_tool_calls", True)
    if tools:
        inputs["tools"] = _json(tools)
        if not parallel:
            inputs["parallel_tool_calls"] = False
        if choice is not None:
            inputs["tool_choice"] = choice if isinstance(choice, str) else _json(choice)
    elif choice not in (None, "none", "auto"):
        raise bad_request("tool_choice: given without tools; send tools, or remove it")
    if kwargs:
        inputs["chat_template_kwargs"] = _json(kwargs)
    return _choices(inputs, given, choices_a_prompt(body))


def client_names(body: Mapping[str, Any]) -> dict[str, str]:
    """The model's names of a chat's parameters → the client's, where they differ."""
    names = {"prompt": "messages"}
    if "max_completion_tokens" in body:
        names["max_tokens"] = "max_completion_tokens"
    if "response_format" in body and "structured_outputs" not in body:
        names |= {"structured_outputs": "response_format", "structured_outputs.json": "response_format.json_schema.schema"}
    return names


def _structure(response_format: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a response_format asks of `structured_outputs`. What the schema may be, the model checks."""
    if not response_format:
        return None
    kind = response_format["type"]
    known = ["type", "json_schema"] if kind == "json_schema" else ["type"]
    for name in response_format:
        if name not in known:
            got = f"the key {shown(name)} with type {shown_json(kind)}"
            raise bad_request(f"response_format: got {got}, expected {' and '.join(known)} alone; remove it")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    schema = response_format["json_schema"].get("schema")
    if schema is None:
        raise bad_request("response_format.json_schema.schema: got none, expected a JSON schema, an object")
    return {"json": schema}


def completion_inputs(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs of every choice of a completion: those of the first prompt, of the second … Raises ApiError 400."""
    given = _given(body, CompletionParams.__annotations__)
    echo = given.pop("echo", False)
    if echo and "logprobs" in given:  # which asks for those of the prompt too
        got = shown_json(given["logprobs"])
        raise bad_request(f"logprobs: got {got} with echo, but a prompt has no log probabilities here; remove echo")
    if "logprobs" in given:
        _checked(NUMBERS["top_logprobs"], "logprobs", given["logprobs"])  # a completion's logprobs are their number
    listed = []
    for prompt in prompts(given.pop("prompt")):
        if echo and not isinstance(prompt, str):
            raise bad_request("echo: got true with token ids, expected a text as prompt; remove it")
        inputs = {"text_input": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
        listed += _choices({**inputs, "exclude_input_in_output": not echo}, given, choices_a_prompt(body))
    if len(listed) > MAX_CHOICES:
        raise bad_request(f"prompt: got {len(listed)} choices in all, expected at most {MAX_CHOICES}; send several requests")
    return listed


def prompts(prompt: Any) -> list[str | list[int]]:
    """A completion's prompts: a text, a list of token ids, or a list of either. Raises ApiError 400.

    Nothing is known of `prompt`: OpenAI's type is of iterables, whose items pydantic checks only when they are read."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise bad_request(f"prompt: got {shown_json(prompt)}, expected a text, a list of token ids, or a list of either")
    if not prompt:
        raise bad_request("prompt: got an empty list, expected at least one prompt")
    if isinstance(prompt[0], int | float):
        return [_token_ids("prompt", prompt)]
    return [each if isinstance(each, str) else _token_ids(f"prompt[{at}]", each) for at, each in enumerate(prompt)]


def _token_ids(where: str, given: Any) -> list[int]:
    if not isinstance(given, list):
        raise bad_request(f"{where}: got {shown_json(given)}, expected a text or a list of token ids")
    for at, token in enumerate(given):
        if type(token) is not int or not TOKEN_ID.minimum <= token <= TOKEN_ID.maximum:  # a bool is an int, but no token
            raise bad_request(f"{where}[{at}]: got {shown_json(token)}, expected a token id, {TOKEN_ID.expected()}")
    return given


def choices_a_prompt(body: Mapping[str, Any]) -> int:
    return body.get("n", 1)


def refuse_missing(
    body: Mapping[str, Any], missing: Set[str], neutral: Mapping[str, Any], remedies: Mapping[str, str] = _REMOVE
) -> None:
    """A parameter of OpenAI's that nothing here has must ask for nothing, as its value in `neutral` does. Raises ApiError
    400."""
    for name, value in body.items():
        if name in missing and (name not in neutral or value != neutral[name]):
            remedy = remedies.get(name, "remove it")
            raise bad_request(f"{name}: got {shown_json(value)}, but this server does not have it; {remedy}")


def _given(body: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """What the model is to know."""
    unknown = set(known) - _SAMPLING - _READ - _FRONT_END - _WITHOUT_EFFECT
    refuse_missing(body, unknown, _NEUTRAL)
    if "stream_options" in body and not body.get("stream"):
        got = shown_json(body["stream_options"])
        raise bad_request(f"stream_options: got {got} without stream; set stream to true, or remove it")
    return {name: value for name, value in body.items() if name not in unknown | _FRONT_END | _WITHOUT_EFFECT}


def _choices(inputs: Mapping[str, Any], sampling: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
    """Choice i has the request's seed + i, modulo 2^64. `best_of` may say that all choices are returned: they are."""
    if not 1 <= n <= MAX_CHOICES:
        raise bad_request(f"n: got {shown_json(n)}, expected 1 to {MAX_CHOICES}")
    sampling = dict(sampling)
    best_of = sampling.pop("best_of", n)
    if isinstance(best_of, bool) or best_of not in (1, n):
        raise bad_request(f"best_of: got {shown_json(best_of)}, expected n, which is {n}; remove it")
    if "seed" not in sampling:
        return [{**inputs, "sampling_parameters": _json(sampling)}] * n
    seed = _checked(_SEED, "seed", sampling["seed"])
    return [{**inputs, "sampling_parameters": _json({**sampling, "seed": (seed + index) % (1 << 64)})} for index in range(n)]


def _checked(number: Number, name: str, value: Any) -> int | float:
    try:
        return number.checked(name, value)
    except ValueError as error:
        raise bad_request(str(error)) from None


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(16)}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False)
