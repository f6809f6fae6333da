"""One inference request of Triton server → one `GenerationRequest`.

| input                   | dtype, shape | meaning                                                                         |
|-------------------------|--------------|---------------------------------------------------------------------------------|
| text_input              | STRING [1]   | the prompt as it is, no chat template                                           |
| input_ids               | INT32 [-1]   | the prompt as token ids; exactly one of text_input and input_ids                |
| stream                  | BOOL [1]     | one response a canvas (true) or one response in all (false, the default)        |
| sampling_parameters     | STRING [1]   | a JSON object, keys as in `SamplingConfig`                                      |
| max_tokens              | INT32 [1]    | `SamplingConfig.max_tokens`                                                     |
| temperature             | FP32 [1]     | `SamplingConfig.temperature`                                                    |
| seed                    | UINT64 [1]   | `SamplingConfig.seed`                                                           |
| stop_words              | STRING [-1]  | `SamplingConfig.stop`                                                           |
| exclude_input_in_output | BOOL [1]     | false: the first response opens with the prompt in the form it came in,         |
|                         |              | text_input before text_output, input_ids before output_ids (default true)       |

A sampling parameter is taken from its own tensor, else from sampling_parameters, else from the request's parameters, else
from the checkpoint. The request's parameters are also where `/generate` puts JSON keys that are not inputs.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from backend.errors import RequestError
from backend.parameters import shown
from backend.sampling_config import SamplingConfig, canonical


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What one client asks for. `timeout_s` runs from the moment the request reaches the model."""

    request_id: str
    prompt: str | list[int]
    sampling: SamplingConfig
    stream: bool = False
    echo_prompt: bool = False
    timeout_s: float | None = None


class InferenceTensor(Protocol):
    """The part of `pb_utils.Tensor` that is read here."""

    def name(self) -> str: ...
    def as_numpy(self) -> np.ndarray: ...


class InferenceRequest(Protocol):
    """The part of `pb_utils.InferenceRequest` that every release has. Later ones add parameters() and timeout()."""

    def inputs(self) -> Iterable[InferenceTensor]: ...
    def request_id(self) -> str: ...


def parse_request(request: InferenceRequest) -> GenerationRequest:
    """Reads every input and parameter of a request. Raises RequestError INVALID_ARGUMENT with one line."""
    values = {tensor.name(): READERS[tensor.name()](tensor.name(), tensor.as_numpy()) for tensor in request.inputs()}
    parameters, timeout_s = _request_parameters(request)
    tensors = {_SAMPLING_KEYS[name]: value for name, value in values.items() if name in _SAMPLING_KEYS}
    return GenerationRequest(
        request_id=request.request_id(),
        prompt=_prompt(values),
        sampling=SamplingConfig.from_mapping(
            {**canonical(parameters), **canonical(values.get("sampling_parameters", {})), **tensors}
        ),
        stream=values.get("stream", False),
        echo_prompt=not values.get("exclude_input_in_output", True),
        timeout_s=timeout_s,
    )


def parse_json_object(name: str, text: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises RequestError INVALID_ARGUMENT if it is anything else or repeats a key."""
    expected = 'expected a JSON object like {"max_tokens": 64}'
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        reason = f"malformed JSON ({error.msg} at character {error.pos})"
        raise RequestError("INVALID_ARGUMENT", f"{name}: got {reason}: {shown(text)}; {expected}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError("INVALID_ARGUMENT", f"{name}: got {error}; {expected}") from None
    if not isinstance(value, dict):
        raise RequestError("INVALID_ARGUMENT", f"{name}: got {shown(text)}; {expected}")
    return value


def _prompt(values: Mapping[str, Any]) -> str | list[int]:
    given = [name for name in ("text_input", "input_ids") if name in values]
    if len(given) != 1:
        got = "both" if given else "neither"
        raise RequestError(
            "INVALID_ARGUMENT", f"prompt: got {got}, expected exactly one of the inputs text_input and input_ids"
        )
    return values[given[0]]


def _request_parameters(request: InferenceRequest) -> tuple[dict[str, Any], float | None]:
    """The client's own parameters, and the time-out, which gRPC sends apart and `/generate` as a parameter. Both in us."""
    parameters = json.loads(request.parameters()) if hasattr(request, "parameters") else {}
    parameters = {name: value for name, value in parameters.items() if not name.startswith("triton_")}
    parameters.pop("id", None)  # `/generate` leaves the request's id among the parameters
    timeout = parameters.pop("timeout", 0)
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
        got = shown(timeout)
        raise RequestError("INVALID_ARGUMENT", f"timeout: got {got}, expected a whole number of microseconds, 0 for no limit")
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
        raise RequestError("INVALID_ARGUMENT", f"{name}: {problem}; send the text encoded as UTF-8") from None


def _json(name: str, array: np.ndarray) -> dict[str, Any]:
    return parse_json_object(name, _string(name, array))


def _integers(name: str, array: np.ndarray) -> list[int]:
    return array.reshape(-1).tolist()


def _scalar(name: str, array: np.ndarray) -> bool | int:
    return array.reshape(-1)[0].item()


def _decimal(name: str, array: np.ndarray) -> float:
    # The shortest decimal of this float32: 0.8 as a tensor and 0.8 in JSON must be the same temperature.
    return float(str(array.reshape(-1)[0]))


READERS: dict[str, Callable[[str, np.ndarray], Any]] = {
    "text_input": _string,
    "input_ids": _integers,
    "stream": _scalar,
    "sampling_parameters": _json,
    "max_tokens": _scalar,
    "temperature": _decimal,
    "seed": _scalar,
    "stop_words": _strings,
    "exclude_input_in_output": _scalar,
}

_SAMPLING_KEYS = {"max_tokens": "max_tokens", "temperature": "temperature", "seed": "seed", "stop_words": "stop"}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key {key!r} {keys.count(key)} times")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is not a JSON number")
