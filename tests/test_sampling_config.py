"""What a request may choose, what it is told otherwise, and what it gets when it says nothing."""

import dataclasses
import math

import numpy as np
import pytest

from backend.errors import RequestError
from backend.generation_defaults import GenerationDefaults
from backend.sampling_config import ResolvedSampling, SamplingConfig

DEFAULTS = GenerationDefaults(
    max_tokens=512,
    entropy_bound=0.2,
    stability_threshold=2,
    confidence_threshold=0.01,
    eos_token_ids=(1, 106, 50),
    pad_token_id=0,
)
NAMES = ", ".join(field.name for field in dataclasses.fields(SamplingConfig))


def refusal(function, *arguments, **named) -> str:
    with pytest.raises(RequestError) as error:
        function(*arguments, **named)
    assert error.value.code == "INVALID_ARGUMENT"
    assert "\n" not in str(error.value)
    return str(error.value)


def test_values_are_normalised():
    config = SamplingConfig(
        max_tokens=np.int32(5), temperature=1, t_max=np.float32(0.5), seed=np.uint64(2**64 - 1), stop="end", stop_token_ids=[3]
    )
    assert (config.max_tokens, config.temperature, config.t_max, config.seed) == (5, 1.0, 0.5, 2**64 - 1)
    assert (config.stop, config.stop_token_ids) == (("end",), (3,))
    assert type(config.max_tokens) is type(config.seed) is int
    assert type(config.temperature) is type(config.t_max) is float
    assert SamplingConfig(stop=["a", "b"]).stop == ("a", "b")
    biased = SamplingConfig(logit_bias={7: -100, np.int32(5): 2})
    assert biased.logit_bias == ((7, -100.0), (5, 2.0)) and type(biased.logit_bias[0][1]) is float
    assert dataclasses.replace(biased, seed=1).logit_bias == biased.logit_bias
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1),
        ("min_tokens", 0),
        ("temperature", 0),
        ("temperature", 0.01),
        ("temperature", 100),
        ("t_min", 0),
        ("top_k", -1),
        ("top_k", 2**31 - 1),
        ("top_p", 0),
        ("top_p", 1),
        ("min_p", 0),
        ("min_p", 1),
        ("logit_bias", ((0, -100.0), (2**31 - 1, 100.0))),
        ("logit_bias", ()),
        ("repetition_penalty", 0.01),
        ("repetition_penalty", 100),
        ("frequency_penalty", -2),
        ("presence_penalty", 2),
        ("seed", 0),
        ("max_denoising_steps", 1),
        ("entropy_bound", 0),
        ("stability_threshold", 0),
        ("confidence_threshold", 0),
        ("stop", []),
        ("stop", ()),
    ],
)
def test_limits_are_included(name, value):
    assert getattr(SamplingConfig(**{name: value}), name) == (tuple(value) if name == "stop" else value)


EXPECTED = {
    "max_tokens": "an integer from 1 to 2147483647",
    "min_tokens": "an integer from 0 to 2147483647",
    "temperature": "0 (greedy, as is less than 0.01) or a finite number from 0.01 to 100",
    "t_min": "a finite number from 0 to 100",
    "t_max": "a finite number from 0.01 to 100",
    "top_k": "an integer from -1 to 2147483647",
    "top_p": "a finite number from 0 to 1",
    "min_p": "a finite number from 0 to 1",
    "repetition_penalty": "a finite number from 0.01 to 100",
    "frequency_penalty": "a finite number from -2 to 2",
    "presence_penalty": "a finite number from -2 to 2",
    "seed": "an integer from 0 to 18446744073709551615",
    "stop": "a non-empty string or a list of them",
    "max_denoising_steps": "an integer from 1 to 65536",
    "entropy_bound": "a finite number from 0 to 1000000",
    "stability_threshold": "an integer from 0 to 2147483647",
    "confidence_threshold": "a finite number from 0 to 1000000",
    "ignore_eos": "true or false",
    "skip_special_tokens": "true or false",
    "logprobs": "true or false",
    "top_logprobs": "an integer from 0 to 20",
}
REFUSED = {
    "max_tokens": [0, -1, 2**31, 1.0, True, "5", [1]],
    "min_tokens": [-1, 2**31, 1.0, True, "5", None],
    "temperature": [-0.1, -1e-9, 101, math.nan, math.inf, -math.inf, True, "1", None, 10**400],
    "t_min": [-1, math.nan, 101, False],
    "t_max": [0, 0.001, math.inf, "0.8"],
    "top_k": [-2, 2**31, 1.5, True, "5", None],
    "top_p": [-0.1, 1.0001, math.nan, True, "1", None],
    "min_p": [-1e-9, 1.1, math.inf, False, None],
    "repetition_penalty": [0, -1.5, 101, math.nan, True, "1.1", None],
    "frequency_penalty": [-2.1, 3, math.nan, True, "1", None],
    "presence_penalty": [-3, 2.001, math.inf, False, None],
    "seed": [-1, 2**64, 1.5, True, "7"],
    "stop": ["", [""], ["a", 1], 5, {"a": 1}, None],
    "max_denoising_steps": [0, 65_537, 2.5, True],
    "entropy_bound": [-0.1, math.nan, True, 10**400, 1e39],
    "stability_threshold": [-1, 1.0, True],
    "confidence_threshold": [-1e-9, math.inf, False, 1e39],
    "ignore_eos": [0, 1, "true", None],
    "skip_special_tokens": [1, "no", None],
    "logprobs": [1, 0, "true", None],
    "top_logprobs": [-1, 21, 5.0, True, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_refused_values(name, value):
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    assert refusal(SamplingConfig, **{name: value}) == f"{name}: got {shown}, expected {EXPECTED[name]}"


def test_stop_strings_are_bounded():
    assert len(SamplingConfig(stop=["x" * 1024] * 64).stop) == 64
    assert refusal(SamplingConfig, stop=["x"] * 65) == "stop: got 65 strings, expected at most 64"
    assert refusal(SamplingConfig, stop=["x" * 1025]) == "stop: got a string of 1025 characters, expected at most 1024"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "stop_token_ids: got 5, expected a list of token ids"),
        (None, "stop_token_ids: got None, expected a list of token ids"),
        ([1, -1], "stop_token_ids: got -1, expected an integer from 0 to 2147483647"),
        ([True], "stop_token_ids: got True, expected an integer from 0 to 2147483647"),
        ([1] * 1025, "stop_token_ids: got 1025 token ids, expected at most 1024"),
    ],
)
def test_refused_stop_token_ids(value, message):
    assert refusal(SamplingConfig, stop_token_ids=value) == message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "logit_bias: got 5, expected an object of token ids and numbers"),
        ([], "logit_bias: got [], expected an object of token ids and numbers"),
        (None, "logit_bias: got None, expected an object of token ids and numbers"),
        ((1, 2), "logit_bias: got (1, 2), expected an object of token ids and numbers"),
        ({"5": 1}, "logit_bias: got '5', expected an integer from 0 to 2147483647"),
        ({-1: 1}, "logit_bias: got -1, expected an integer from 0 to 2147483647"),
        ({True: 1}, "logit_bias: got True, expected an integer from 0 to 2147483647"),
        ({5: 100.5}, "logit_bias of token id 5: got 100.5, expected a finite number from -100 to 100"),
        ({5: -math.inf}, "logit_bias of token id 5: got -inf, expected a finite number from -100 to 100"),
        ({5: None}, "logit_bias of token id 5: got None, expected a finite number from -100 to 100"),
        (((5, 1), (5, 2)), "logit_bias: got token id 5 twice, expected once"),
        (dict.fromkeys(range(10_001), 1), "logit_bias: got 10001 token ids, expected at most 10000"),
    ],
)
def test_refused_logit_bias(value, message):
    assert refusal(SamplingConfig, logit_bias=value) == message


def test_top_logprobs_need_logprobs():
    assert refusal(SamplingConfig, top_logprobs=5) == "top_logprobs: got 5 without logprobs; set logprobs to true"
    assert SamplingConfig(top_logprobs=0) == SamplingConfig()


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({}, {}),
        ({"max_tokens": "12"}, {"max_tokens": 12}),
        ({"max_tokens": 12.0}, {"max_tokens": 12}),
        ({"max_new_tokens": " 12 "}, {"max_tokens": 12}),
        ({"temperature": "0.7"}, {"temperature": 0.7}),
        ({"temperature": "0"}, {"temperature": 0.0}),
        ({"seed": "18446744073709551615"}, {"seed": 2**64 - 1}),
        ({"ignore_eos": "True", "skip_special_tokens": "false"}, {"ignore_eos": True, "skip_special_tokens": False}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop_words": ["x", "y"]}, {"stop": ("x", "y")}),
        ({"stop_token_ids": ["3", 4]}, {"stop_token_ids": (3, 4)}),
        ({"top_k": "40", "top_p": "0.9", "min_p": "0.05"}, {"top_k": 40, "top_p": 0.9, "min_p": 0.05}),
        ({"top_k": -1, "top_p": 1, "min_p": 0, "logit_bias": {}}, {"top_k": -1}),
        ({"logit_bias": {"5": -100, " 6": "1.5", 7: 2}}, {"logit_bias": {5: -100, 6: 1.5, 7: 2}}),
        ({"logprobs": True}, {"logprobs": True}),
        ({"logprobs": "true", "top_logprobs": "5"}, {"logprobs": True, "top_logprobs": 5}),
        ({"logprobs": 5}, {"logprobs": True, "top_logprobs": 5}),
        ({"logprobs": "5", "top_logprobs": 5}, {"logprobs": True, "top_logprobs": 5}),
        ({"logprobs": 0}, {"logprobs": True}),
        ({"logprobs": "False", "top_logprobs": 0}, {}),
        (dict.fromkeys((*EXPECTED, "max_new_tokens", "stop_words", "logit_bias", "n")), {}),
        ({"max_tokens": None, "max_new_tokens": 3}, {"max_tokens": 3}),
    ],
)
def test_from_mapping(mapping, expected):
    assert SamplingConfig.from_mapping(mapping) == SamplingConfig(**expected)


@pytest.mark.parametrize(
    ("name", "neutral", "refused"),
    [
        ("n", [1, 1.0, "1", None], [2, 0, "2", True, "one"]),
        ("best_of", [1], [3]),
        ("num_beams", [1], [4]),
        ("use_beam_search", [False, "false"], [True, 0]),
        ("early_stopping", [False], [True]),
        ("do_sample", [True, "true"], [False]),
        ("length_penalty", [1.0], [0.9]),
        ("typical_p", [1.0], [0.5]),
        ("bad_words", [[]], [["a"]]),
        ("prompt_logprobs", [None], [0, False]),
        ("include_stop_str_in_output", [False], [True]),
        ("spaces_between_special_tokens", [True], [False]),
        ("return_token_ids", [False], [True]),
        ("add_generation_prompt", [True], [False]),
        ("continue_final_message", [False], [True]),
        ("include_reasoning", [True], [False]),
        ("separate_reasoning", [True], [False]),
    ],
)
def test_unsupported_parameters(name, neutral, refused):
    for value in neutral:
        assert SamplingConfig.from_mapping({name: value}) == SamplingConfig()
    for value in refused:
        message = refusal(SamplingConfig.from_mapping, {name: value})
        assert message == f"{name}={value!r}: not supported by this server; remove it"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ([], "sampling parameters: got [], expected a JSON object"),
        ({"n": 2, "num_beams": 5, "best_of": 1}, "n=2, num_beams=5: not supported by this server; remove it"),
        ({"min_tokens": 5, "stop": "a"}, "min_tokens and stop: both given, but stop may end the answer sooner; remove one"),
        (
            {"min_new_tokens": 5, "infill": [3]},
            "min_tokens and infill: both given, but infill may end the answer sooner; remove one",
        ),
        ({"foo": 1}, f"unknown sampling parameter 'foo'; expected {NAMES}"),
        (
            {"temprature": 1, "zzz": 2, "max_token": 3, "seed": 4},
            "unknown sampling parameter 'temprature' (closest: 'temperature'), 'zzz', 'max_token' (closest: 'max_tokens'); "
            f"expected {NAMES}",
        ),
        ({"max_tokens": 1, "max_new_tokens": 1}, "max_tokens and max_new_tokens: both given, but mean the same; remove one"),
        ({"stop": "a", "stop_words": ["a"]}, "stop and stop_words: both given, but mean the same; remove one"),
        ({"max_tokens": "5x"}, "max_tokens: got '5x', expected an integer from 1 to 2147483647"),
        ({"max_tokens": "1_000"}, "max_tokens: got '1_000', expected an integer from 1 to 2147483647"),
        ({"max_tokens": 1.5}, "max_tokens: got 1.5, expected an integer from 1 to 2147483647"),
        ({"max_new_tokens": 0}, "max_tokens: got 0, expected an integer from 1 to 2147483647"),
        ({"temperature": "hot"}, f"temperature: got 'hot', expected {EXPECTED['temperature']}"),
        ({"temperature": "nan"}, f"temperature: got nan, expected {EXPECTED['temperature']}"),
        ({"ignore_eos": "yes"}, "ignore_eos: got 'yes', expected true or false"),
        ({"top_p": "most"}, "top_p: got 'most', expected a finite number from 0 to 1"),
        ({"logit_bias": []}, "logit_bias: got [], expected an object of token ids and numbers"),
        ({"logit_bias": {"the": 1}}, "logit_bias: got 'the', expected an integer from 0 to 2147483647"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias: got token id 5 twice, expected once"),
        ({"logprobs": 21}, "top_logprobs: got 21, expected an integer from 0 to 20"),
        ({"logprobs": "many"}, "logprobs: got 'many', expected true or false"),
        ({"logprobs": 3, "top_logprobs": 4}, "logprobs=3 and top_logprobs=4: differ; give one number"),
        ({"logprobs": False, "top_logprobs": 4}, "top_logprobs: got 4 without logprobs; set logprobs to true"),
        ({"stop_words": ["a\nb", 3]}, "stop: got ['a\\nb', 3], expected a non-empty string or a list of them"),
    ],
)
def test_refused_mappings(mapping, message):
    assert refusal(SamplingConfig.from_mapping, mapping) == message


def test_an_answer_of_too_few_tokens_is_refused():
    assert SamplingConfig(max_tokens=5, min_tokens=5).resolve(DEFAULTS).min_tokens == 5
    for config, most in ((SamplingConfig(min_tokens=513), 512), (SamplingConfig(min_tokens=513, max_tokens=9), 9)):
        message = f"min_tokens: got 513, expected at most max_tokens, {most}; raise that"
        assert refusal(config.resolve, DEFAULTS) == message


def test_resolve_takes_the_defaults():
    assert SamplingConfig(seed=5).resolve(DEFAULTS) == ResolvedSampling(
        max_tokens=512,
        min_tokens=0,
        max_denoising_steps=48,
        t_min=0.4,
        t_max=0.8,
        greedy=False,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        logit_bias=(),
        repetition_penalty=1.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        entropy_bound=0.2,
        stability_threshold=2,
        confidence_threshold=0.01,
        seed=5,
        stop=(),
        stop_token_ids=(),
        eos_token_ids=(1, 106, 50),
        skip_special_tokens=True,
        logprobs=False,
        top_logprobs=0,
    )


def test_resolve_prefers_the_request():
    config = SamplingConfig(
        min_tokens=0,
        max_tokens=9999,  # the checkpoint's max_new_tokens is no cap
        temperature=0.5,
        t_min=0.2,
        t_max=1.0,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        logit_bias={5: -100},
        repetition_penalty=1.25,
        frequency_penalty=-0.5,
        presence_penalty=2,
        seed=0,
        stop="x",
        stop_token_ids=[7],
        ignore_eos=True,
        max_denoising_steps=8,
        entropy_bound=0.0,
        stability_threshold=0,
        confidence_threshold=0.0,
        skip_special_tokens=False,
        logprobs=True,
        top_logprobs=3,
    )
    assert config.resolve(DEFAULTS) == ResolvedSampling(
        max_tokens=9999,
        min_tokens=0,
        max_denoising_steps=8,
        t_min=0.1,
        t_max=0.5,
        greedy=False,
        top_k=40,
        top_p=0.9,
        min_p=0.05,
        logit_bias=((5, -100.0),),
        repetition_penalty=1.25,
        frequency_penalty=-0.5,
        presence_penalty=2.0,
        entropy_bound=0.0,
        stability_threshold=0,
        confidence_threshold=0.0,
        seed=0,
        stop=("x",),
        stop_token_ids=(7,),
        eos_token_ids=(),
        skip_special_tokens=False,
        logprobs=True,
        top_logprobs=3,
    )
    assert SamplingConfig(top_k=-1).resolve(DEFAULTS).top_k == 0


@pytest.mark.parametrize("temperature", [0, 1e-9, 0.001, 0.00999])
def test_greedy_keeps_the_temperature_schedule(temperature):
    """A temperature below the smallest is greedy too: it does not scale the schedule to nothing."""
    assert SamplingConfig(temperature=temperature).temperature == 0
    resolved = SamplingConfig(temperature=temperature, seed=1).resolve(DEFAULTS)
    assert (resolved.greedy, resolved.t_min, resolved.t_max) == (True, 0.4, 0.8)


@pytest.mark.parametrize(
    "filters", [{"top_k": 1}, {"top_p": 0}, {"min_p": 1}, {"top_k": 1, "top_p": 0.5, "min_p": 0.5}], ids=str
)
def test_filters_that_leave_one_token_are_greedy(filters):
    """At the temperature that the request asks for; there is nothing left to filter."""
    resolved = SamplingConfig(temperature=0.5, seed=1, **filters).resolve(DEFAULTS)
    assert (resolved.greedy, resolved.t_min, resolved.t_max) == (True, 0.2, 0.4)
    assert (resolved.top_k, resolved.top_p, resolved.min_p) == (0, 1.0, 0.0)
    assert not SamplingConfig(temperature=0.5, top_k=2, top_p=0.01, min_p=0.99).resolve(DEFAULTS).greedy


def test_a_seed_is_drawn_for_each_request():
    config = SamplingConfig()
    seeds = {config.resolve(DEFAULTS).seed for _ in range(8)}
    assert len(seeds) == 8 and all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"t_min": 0.9}, "t_min: got 0.9, expected at most t_max, 0.8; set t_max too, it is the checkpoint's"),
        ({"t_max": 0.3}, "t_min: got 0.4, expected at most t_max, 0.3; set t_min too, it is the checkpoint's"),
        ({"t_min": 0.5, "t_max": 0.2}, "t_min: got 0.5, expected at most t_max, 0.2; swap them"),
    ],
)
def test_t_min_above_t_max(given, message):
    assert refusal(SamplingConfig(**given).resolve, DEFAULTS) == message
    SamplingConfig(t_min=0.8).resolve(DEFAULTS)  # equal is a constant temperature
