"""Request parsing, without a server: every input, their precedence, and one clear line for everything that is wrong."""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from google.protobuf import text_format
from tokenizers import Tokenizer, models
from tritonclient.grpc import model_config_pb2

from backend.chat.template import ChatTemplate
from backend.errors import RequestError
from backend.json_text import parse_json_object
from backend.triton_server.launch import MODEL_NAME, MODEL_REPOSITORY
from backend.triton_server.request import READERS, parse_request


@dataclass
class Tensor:
    label: str
    array: np.ndarray

    def name(self) -> str:
        return self.label

    def as_numpy(self) -> np.ndarray:
        return self.array


@dataclass
class OldRequest:
    """A request of a release that has neither parameters() nor timeout()."""

    tensors: dict[str, np.ndarray]

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self.tensors.items()]

    def request_id(self) -> str:
        return "r1"


@dataclass
class Request(OldRequest):
    given_parameters: dict = field(default_factory=dict)
    timeout_us: int = 0

    def parameters(self) -> str:
        return json.dumps(self.given_parameters)

    def timeout(self) -> int:
        return self.timeout_us


def strings(*values: str | bytes) -> np.ndarray:
    return np.array([value.encode() if isinstance(value, str) else value for value in values], np.object_)


def asking(parameters: dict | None = None, timeout_us: int = 0, **tensors: np.ndarray) -> Request:
    """A request with a prompt and whatever else is given."""
    return Request({"text_input": strings("hello"), **tensors}, parameters or {}, timeout_us)


def test_the_inputs_are_those_of_config_pbtxt():
    text = (MODEL_REPOSITORY / MODEL_NAME / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert {tensor.name for tensor in config.input} == set(READERS)
    assert all(tensor.optional for tensor in config.input)


def test_every_input_is_read():
    parsed = parse_request(
        Request(
            {
                "input_ids": np.array([5, 6, 7], np.int32),
                "stream": np.array([True]),
                "sampling_parameters": strings('{"t_min": 0.3}'),
                "max_tokens": np.array([11], np.int32),
                "temperature": np.array([0.7], np.float32),
                "seed": np.array([2**64 - 1], np.uint64),
                "stop_words": strings("a", "é"),
                "exclude_input_in_output": np.array([False]),
            }
        )
    )
    assert parsed.request_id == "r1"
    assert parsed.prompt == [5, 6, 7]
    assert parsed.stream and parsed.echo_prompt
    sampling = parsed.sampling
    assert (sampling.t_min, sampling.max_tokens, sampling.temperature) == (0.3, 11, 0.7)
    assert (sampling.seed, list(sampling.stop)) == (2**64 - 1, ["a", "é"])


def test_defaults():
    parsed = parse_request(asking())
    assert parsed.prompt == "hello"
    assert (parsed.stream, parsed.echo_prompt, parsed.timeout_s) == (False, False, None)


def test_a_request_of_an_old_release_needs_neither_parameters_nor_timeout():
    assert parse_request(OldRequest({"text_input": strings("hello")})).prompt == "hello"


@pytest.mark.parametrize(
    ("tensors", "parameters", "max_tokens"),
    [
        ({"max_tokens": np.array([1], np.int32), "sampling_parameters": strings('{"max_tokens": 2}')}, {"max_tokens": 3}, 1),
        ({"sampling_parameters": strings('{"max_tokens": 2}')}, {"max_tokens": 3}, 2),
        ({"sampling_parameters": strings('{"seed": 2}')}, {"max_tokens": 3}, 3),
        ({}, {"max_tokens": "4"}, 4),
        ({"max_tokens": np.array([1], np.int32)}, {"max_new_tokens": 3}, 1),
        ({"sampling_parameters": strings('{"max_tokens": null}')}, {"max_tokens": 3}, 3),
    ],
    ids=["tensor", "sampling_parameters", "request parameter", "number as a string", "alias", "null"],
)
def test_precedence(tensors, parameters, max_tokens):
    assert parse_request(asking(parameters, **tensors)).sampling.max_tokens == max_tokens


@pytest.mark.parametrize(
    ("parameters", "max_tokens"), [({}, 4096), ({"max_tokens": 5}, 5), ({"max_new_tokens": 5}, 5), ({"max_tokens": None}, 4096)]
)
def test_the_servers_default_is_for_requests_that_say_nothing(parameters, max_tokens):
    assert parse_request(asking(parameters), default_max_tokens=4096).sampling.max_tokens == max_tokens
    assert parse_request(asking(), default_max_tokens=0).sampling.max_tokens is None


@pytest.mark.parametrize("in_json", [True, False], ids=["sampling_parameters", "request parameter"])
def test_a_number_as_logprobs_stays_beside_the_flag_of_another_source(in_json):
    """It is two parameters in one, and the flag is laid over the first alone."""
    tensors = {"return_logprobs": np.array([True])} | ({"sampling_parameters": strings('{"logprobs": 5}')} if in_json else {})
    sampling = parse_request(asking(parameters={} if in_json else {"logprobs": 5}, **tensors)).sampling
    assert (sampling.logprobs, sampling.top_logprobs) == (True, 5)


@pytest.mark.parametrize("value", [0.8, 0.1, 1.0, 0.3333333, 0.0])
def test_a_temperature_is_the_same_as_a_tensor_and_in_json(value):
    as_tensor = parse_request(asking(temperature=np.array([value], np.float32)))
    in_json = parse_request(asking(sampling_parameters=strings(json.dumps({"temperature": value}))))
    assert as_tensor.sampling.temperature == in_json.sampling.temperature == value


@pytest.mark.parametrize(
    ("parameters", "timeout_us", "timeout_s"),
    [({}, 0, None), ({}, 1_500_000, 1.5), ({"timeout": 2_000_000}, 0, 2.0), ({"timeout": 0}, 0, None)],
)
def test_timeout(parameters, timeout_us, timeout_s):
    assert parse_request(asking(parameters, timeout_us)).timeout_s == timeout_s


def test_what_the_server_adds_to_the_parameters_is_not_the_clients():
    parsed = parse_request(asking({"id": "r1", "triton_enable_empty_final_response": True}))
    assert parsed == parse_request(asking())


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request({}), ["prompt", "got none", "text_input, messages, input_ids"]),
        (asking(parallel_tool_calls=np.array([False])), ["parallel_tool_calls: given without messages; send messages"]),
        (asking(input_ids=np.array([1], np.int32)), ["prompt", "got text_input and input_ids", "exactly one"]),
        (Request({"text_input": strings(b"ab\xff")}), ["text_input", "UTF-8", "byte 2"]),
        (asking(stop_words=strings("a", b"\xc3")), ["stop_words", "UTF-8"]),
        (asking(sampling_parameters=strings("{bad")), ["sampling_parameters", "malformed JSON", "character 1", "{bad"]),
        (asking(sampling_parameters=strings("")), ["sampling_parameters", "malformed JSON"]),
        (asking(sampling_parameters=strings("[1]")), ["sampling_parameters", "[1]", "JSON object"]),
        (asking(sampling_parameters=strings('{"seed": NaN}')), ["sampling_parameters", "NaN"]),
        (asking(sampling_parameters=strings('{"seed": 1, "seed": 2}')), ["sampling_parameters", "'seed' 2 times"]),
        (asking(sampling_parameters=strings('{"temperature": 1e999}')), ["1e999, which is more than numbers can be"]),
        (asking(sampling_parameters=strings('{"a": 1, "seed": 1, "seed": 2, "seed": 3}')), ["'seed' 3 times"]),
        (asking(sampling_parameters=strings('{"seed":' + "9" * 5000 + "}")), ["sampling_parameters", "JSON object"]),
        (asking(sampling_parameters=strings("[" * 100_000)), ["sampling_parameters", "JSON object"]),
        (asking(sampling_parameters=strings('{"nonsense": 1}')), ["nonsense"]),
        (asking({"nonsense": 1}), ["nonsense"]),
        (asking({"max_tokens": "many"}), ["max_tokens", "many"]),
        (asking(max_tokens=np.array([-1], np.int32)), ["max_tokens", "-1"]),
        (asking(temperature=np.array([np.nan], np.float32)), ["temperature", "nan"]),
        (asking({"timeout": -1}), ["timeout", "-1", "microseconds"]),
        (asking({"timeout": "soon"}), ["timeout", "'soon'", "microseconds"]),
        (asking({"timeout": True}), ["timeout", "True", "microseconds"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(request_, words):
    with pytest.raises(RequestError) as caught:
        parse_request(request_)
    assert caught.value.code == "INVALID_ARGUMENT"
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert [word for word in words if word not in message] == []


TEMPLATE = ChatTemplate(
    "{% for message in messages %}{% for part in message.content %}{{ part.text or '<' ~ part.type ~ '>' }}"
    "{{ part.keys() | list | length }}{% endfor %}{% endfor %}",
    {},
    Tokenizer(models.BPE()),
)
PLACE, URL = {"type": "image"}, {"type": "image_url", "image_url": {"url": "data:,b", "detail": "low"}}
WORDS = {"type": "text", "text": "and"}


def with_images(content: list, *images: str, **tensors: np.ndarray) -> Request:
    messages = strings(json.dumps([{"role": "user", "content": content}]))
    return Request({"messages": messages} | ({"image": strings(*images)} if images else {}) | tensors)


def test_images_stand_where_the_messages_have_a_place_for_them():
    parsed = parse_request(with_images([PLACE, WORDS, URL, PLACE], "a", "c"), TEMPLATE)
    assert parsed.images == ("a", "data:,b", "c")
    assert parsed.prompt == "<image>1and2<image>1<image>1"  # a template never sees what an image is


def test_images_of_a_prompt_that_is_no_chat_are_counted_later():
    assert parse_request(asking(image=strings("a", "b"))).images == ("a", "b")
    assert parse_request(Request({"input_ids": np.array([1], np.int32), "image": strings("a")})).images == ("a",)
    assert parse_request(asking()).images == ()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (with_images([WORDS], "a"), ["image: got 1 images, expected 0", "image_url"]),
        (with_images([PLACE, URL]), ["image: got 0 images, expected 1"]),
        (with_images([PLACE], "a", "b"), ["image: got 2 images, expected 1"]),
        (with_images([{"type": "image_url"}]), ["messages[0].content[0]", "image_url"]),
        (with_images([{"type": "image_url", "image_url": {"url": 5}}]), ["messages[0].content[0].image_url.url", "got 5"]),
        (with_images([{"type": "audio"}]), ["messages[0].content[0].type", "'audio'", "image_url"]),
    ],
)
def test_images_that_do_not_fit_their_messages(request_, words):
    with pytest.raises(RequestError) as caught:
        parse_request(request_, TEMPLATE)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert [word for word in words if word not in str(caught.value)] == []


def test_long_input_is_not_repeated_whole():
    with pytest.raises(RequestError) as caught:
        parse_json_object("sampling_parameters", "x" * 1000)
    assert len(str(caught.value)) < 250
