"""Biases, penalties, filters, log probabilities in whole generations, against transformers' `generate` with the same noise."""

import itertools
from dataclasses import replace

import pytest
import torch
from oracles import Oracle
from small_checkpoints import TINY, random_checkpoint
from test_generation import RANDOM, llm_of, prompt_of
from tolerances import TOLERANCE
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

from backend import LLM, RequestError, SamplingConfig
from backend.generation import Generation

VOCAB_SIZE = 97
PROMPT = prompt_of(30)
# A log probability is a difference of logits, so as exact as they are; the soft cap, 30, is their largest magnitude.
LOGPROB_TOLERANCE = TOLERANCE[torch.float32] * 30
RANDOM_OF_THE_ORACLE = {"max_new_tokens": 40, "max_denoising_steps": 8, "eos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[LLM, Oracle]:
    checkpoint = random_checkpoint(tmp_path_factory.mktemp("random"), seed=8)
    return llm_of(checkpoint), Oracle(checkpoint)


def expected_of(oracle: Oracle, *, seed: int, **choices):
    return oracle.generate(PROMPT, seed=seed, **{**RANDOM_OF_THE_ORACLE, **choices})


def tokens_of(expected) -> list[int]:
    return expected.token_ids(max_tokens=40, ends=set())


def one(llm: LLM, **sampling):
    [result] = llm.generate([PROMPT], SamplingConfig(**{"seed": 3, **RANDOM, **sampling}))
    return result


@pytest.mark.parametrize("temperature", [1.0, 0])
def test_logit_bias_is_transformers_logits_processor(pair, temperature):
    """After the soft cap, before the temperature, seen by everything: small biases that shift but do not decide."""
    llm, oracle = pair
    bias = {token: float(value) for token, value in enumerate(torch.linspace(-3, 3, VOCAB_SIZE))}
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = expected_of(oracle, seed=3, greedy=temperature == 0, logits_processor=LogitsProcessorList([processor]))
    result = one(llm, logit_bias=bias, temperature=temperature)
    assert result.token_ids == tokens_of(expected)
    assert result.num_steps == expected.num_steps
    assert result.token_ids != one(llm, temperature=temperature).token_ids


def test_a_bias_of_minus_100_bans(pair):
    llm, _ = pair
    banned = set(one(llm).token_ids)
    assert len(banned) > 10
    for temperature in (0, 1, 100):
        result = one(llm, logit_bias=dict.fromkeys(banned, -100), temperature=temperature)
        assert not set(result.token_ids) & banned


def test_a_bias_of_100_forces_and_the_canvas_converges_at_once(pair):
    """Nothing else is likely, so that the second step repeats the first, surely."""
    llm, _ = pair
    result = one(llm, logit_bias={5: 100})
    assert (result.token_ids, result.num_steps) == ([5] * 40, [2, 2, 2])
    assert set(one(llm, logit_bias={5: 100, 6: 100}).token_ids) == {5, 6}


class NotEnded(LogitsProcessor):
    """The tokens that would end an answer are impossible in its first places."""

    def __init__(self, ends: list[int], num_places: int):
        self._ends, self._num_places = ends, num_places

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        places = max(0, self._num_places - input_ids.shape[1] + len(PROMPT))
        scores = scores.clone()
        scores[:, :places, self._ends] = -1e9
        return scores


@pytest.mark.parametrize("temperature", [1.0, 0])
@pytest.mark.parametrize("min_tokens", [9, 16, 25])
def test_an_answer_has_min_tokens(pair, min_tokens, temperature):
    """Canvases are of 16 tokens: within the first, all of it, within the second."""
    llm, oracle = pair
    ends = sorted(set(one(llm, temperature=temperature).token_ids[3:8]))
    processor = NotEnded(ends, min_tokens)
    expected = expected_of(oracle, seed=3, greedy=temperature == 0, logits_processor=LogitsProcessorList([processor]))
    sampling = {"temperature": temperature, "stop_token_ids": ends}
    short, result = one(llm, **sampling), one(llm, **sampling, min_tokens=min_tokens)
    assert result.token_ids == expected.token_ids(max_tokens=40, ends=set(ends))
    assert len(short.token_ids) < min_tokens <= len(result.token_ids)
    all_of_it = one(llm, **sampling, min_tokens=40)
    assert (len(all_of_it.token_ids), all_of_it.finish_reason) == (40, "length")
    assert not set(all_of_it.token_ids) & set(ends)


class Penalties(LogitsProcessor):
    """OpenAI's formula, of what transformers has of the answer when it processes logits: the canvases before."""

    def __init__(self, frequency: float, presence: float):
        self._frequency, self._presence = frequency, presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = input_ids[0, len(PROMPT) :].bincount(minlength=VOCAB_SIZE)
        return scores - counts * self._frequency - (counts > 0) * self._presence


@pytest.mark.parametrize("temperature", [1.0, 0])
@pytest.mark.parametrize(("frequency", "presence"), [(0.5, 0.0), (0.0, 1.5), (-0.25, 0.75)])
def test_penalties_are_of_the_canvases_before(pair, frequency, presence, temperature):
    llm, oracle = pair
    bias = {7: 1.5}
    processors = LogitsProcessorList([SequenceBiasLogitsProcessor([[[7], 1.5]]), Penalties(frequency, presence)])
    expected = expected_of(oracle, seed=3, greedy=temperature == 0, logits_processor=processors)
    penalties = {"frequency_penalty": frequency, "presence_penalty": presence}
    result, without = (one(llm, logit_bias=bias, temperature=temperature, **more) for more in (penalties, {}))
    assert result.token_ids == tokens_of(expected)
    assert result.num_steps == expected.num_steps
    canvas = oracle.canvas_length
    assert result.token_ids[:canvas] == without.token_ids[:canvas] and result.token_ids != without.token_ids


class OfEveryPosition(LogitsProcessor):
    """transformers' processor, which knows one position a sequence, on a canvas."""

    def __init__(self, processor: LogitsProcessor):
        self._processor = processor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        [of_canvas] = scores
        return self._processor(input_ids.expand(len(of_canvas), -1), of_canvas)[None]


@pytest.mark.parametrize("temperature", [1.0, 0])
@pytest.mark.parametrize("penalty", [1.2, 3.0, 0.7])
def test_a_repetition_penalty_is_of_the_prompt_and_the_canvases_before(pair, penalty, temperature):
    llm, oracle = pair
    processors = [OfEveryPosition(RepetitionPenaltyLogitsProcessor(penalty)), SequenceBiasLogitsProcessor([[[7], 1.5]])]
    expected = expected_of(oracle, seed=3, greedy=temperature == 0, logits_processor=LogitsProcessorList(processors))
    sampling = {"logit_bias": {7: 1.5}, "temperature": temperature}
    result = one(llm, repetition_penalty=penalty, **sampling)
    assert result.token_ids == tokens_of(expected)
    assert result.num_steps == expected.num_steps
    assert result.token_ids[: oracle.canvas_length] != one(llm, **sampling).token_ids[: oracle.canvas_length]


@pytest.mark.parametrize(
    ("filters", "warpers"),
    [
        ({"top_k": 3}, [TopKLogitsWarper(3)]),
        ({"top_p": 0.4}, [TopPLogitsWarper(0.4)]),
        ({"min_p": 0.3}, [MinPLogitsWarper(0.3)]),
        (
            {"top_k": 10, "top_p": 0.8, "min_p": 0.1},
            [TopKLogitsWarper(10), TopPLogitsWarper(0.8), MinPLogitsWarper(0.1)],
        ),
    ],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_filters_are_transformers_warpers_on_the_sampled_token(pair, filters, warpers):
    """With a bound that accepts much of what is drawn."""
    llm, oracle = pair
    sampler_config = EntropyBoundSamplerConfig(entropy_bound=10.0)
    expected = expected_of(oracle, seed=3, warpers=LogitsProcessorList(warpers), sampler_config=sampler_config)
    result = one(llm, entropy_bound=10.0, **filters)
    assert result.token_ids == tokens_of(expected)
    assert result.num_steps == expected.num_steps
    assert result.token_ids != one(llm, entropy_bound=10.0).token_ids


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}], ids=str)
def test_filters_that_leave_one_token_are_greedy(pair, filters):
    llm, _ = pair
    assert one(llm, **filters) == one(llm, temperature=0) != one(llm)


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.5}], ids=str)
def test_greedy_needs_no_filters(pair, filters):
    llm, _ = pair
    assert one(llm, temperature=0, **filters) == one(llm, temperature=0)


@pytest.mark.parametrize("choices", [{}, {"temperature": 0}, {"logit_bias": {5: 4.0}}, {"top_k": 3, "top_p": 0.7}], ids=str)
def test_logprobs_are_those_of_transformers_last_step(pair, choices):
    """Of the committed tokens, under the processed distribution: the bias is in it, the filters are not."""
    llm, oracle = pair
    processors, warpers = LogitsProcessorList(), LogitsProcessorList()
    if "logit_bias" in choices:
        processors.append(SequenceBiasLogitsProcessor([[[5], 4.0]]))
    if "top_k" in choices:
        warpers.extend([TopKLogitsWarper(3), TopPLogitsWarper(0.7)])
    expected = expected_of(oracle, seed=3, greedy="temperature" in choices, warpers=warpers, logits_processor=processors)
    logprobs = torch.cat(expected.probabilities)[:40].log()
    values, token_ids = logprobs.topk(5)

    result = one(llm, logprobs=True, top_logprobs=5, **choices)
    assert result.token_ids == tokens_of(expected) == token_ids[:, 0].tolist()
    assert result.logprobs == pytest.approx(values[:, 0].tolist(), rel=0, abs=LOGPROB_TOLERANCE)
    assert [[token for token, _ in each] for each in result.top_logprobs] == token_ids.tolist()
    actual = torch.tensor([[value for _, value in each] for each in result.top_logprobs])
    torch.testing.assert_close(actual, values, rtol=0, atol=LOGPROB_TOLERANCE)
    assert one(llm, **choices) == replace(result, logprobs=None, top_logprobs=None)
    assert one(llm, logprobs=True, **choices) == replace(result, top_logprobs=None)


@pytest.mark.parametrize("choices", [{}, {"temperature": 0}, {"entropy_bound": 10.0, "temperature": 2.0}], ids=str)
def test_given_tokens_are_the_only_ones_possible_in_their_places(pair, choices):
    """Over two and a half canvases of 16, of which the second begins with a blank and the third has none."""
    llm, oracle = pair
    infill = [[5, 6, 7], 9, [8], 6, [9] * 3, 10]
    given = [5, 6, 7, *[-1] * 9, 8, *[-1] * 6, 9, 9, 9, *[-1] * 10]
    changed = {"sampler_config": EntropyBoundSamplerConfig(entropy_bound=10.0), "t_min": 0.8, "t_max": 1.6}
    expected = expected_of(
        oracle, seed=3, greedy=choices.get("temperature") == 0, given=given, **(changed if "entropy_bound" in choices else {})
    )
    result = one(llm, infill=infill, **choices)
    assert result.token_ids == tokens_of(expected)
    assert result.num_steps == expected.num_steps
    assert all(token in (-1, other) for token, other in zip(given, result.token_ids, strict=False))
    free = [other for token, other in zip(given, result.token_ids, strict=False) if token == -1]
    assert free != [other for token, other in zip(given, one(llm, **choices).token_ids, strict=False) if token == -1]


def test_given_tokens_have_probability_1_and_blanks_their_distributions(pair):
    llm, oracle = pair
    expected = expected_of(oracle, seed=3, given=[5, -1, 7])
    result = one(llm, infill=[[5], 1, [7]], logprobs=True, top_logprobs=3)
    assert result.token_ids == tokens_of(expected)
    assert [result.logprobs[index] for index in (0, 2)] == [0, 0]
    assert [result.top_logprobs[index] for index in (0, 2)] == [[(5, 0.0)], [(7, 0.0)]]
    values, token_ids = torch.cat(expected.probabilities)[:40].log()[[1, 3]].topk(3)
    assert [[token for token, _ in result.top_logprobs[index]] for index in (1, 3)] == token_ids.tolist()
    assert [value for _, value in result.top_logprobs[1]] == pytest.approx(values[0].tolist(), rel=0, abs=LOGPROB_TOLERANCE)


DIGITS, BELL = range(68, 78), 27  # tokens of bytes, the latter of the only one for its character


class _FirstToken(LogitsProcessor):
    """The first token of a canvas is one of `allowed`."""

    def __init__(self, allowed):
        self._forbidden = [token for token in range(VOCAB_SIZE) if token not in allowed]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 0, self._forbidden] = -1e9
        return scores


@pytest.mark.parametrize("temperature", [1.0, 0])
def test_a_grammar_chooses_first_tokens_and_cuts_canvases(pair, temperature):
    """Every canvas is transformers' behind what has been kept, and its own noise; digits are kept as far as they go."""
    llm, oracle = pair
    tokens, num_steps, logprobs = [], [], []
    while len(tokens) < 12:
        processors = LogitsProcessorList([_FirstToken(DIGITS)])
        one_canvas = {"max_new_tokens": 16, "greedy": temperature == 0, "first_canvas": len(num_steps)}
        expected = oracle.generate(
            PROMPT + tokens, seed=3, logits_processor=processors, **{**RANDOM_OF_THE_ORACLE, **one_canvas}
        )
        [canvas] = expected.canvases
        own = list(itertools.takewhile(lambda token: token in DIGITS, canvas))[: 12 - len(tokens)]
        assert own
        tokens, num_steps = tokens + own, num_steps + expected.num_steps
        logprobs += expected.probabilities[0].max(-1).values.log()[: len(own)].tolist()
    result = one(llm, structured_outputs={"regex": "[0-9]{12}\\x07"}, temperature=temperature, logprobs=True)
    assert (result.token_ids, result.num_steps, result.finish_reason) == ([*tokens, BELL], num_steps, "stop")
    assert result.logprobs == pytest.approx([*logprobs, 0.0], rel=0, abs=LOGPROB_TOLERANCE)
    assert len(num_steps) > 3


EVERY_KIND = [
    {},
    {"top_k": 4},
    {"temperature": 0},
    {"logit_bias": {5: 3.0, 7: -100}, "logprobs": True},
    {"top_p": 0.5, "min_p": 0.02, "logprobs": True, "top_logprobs": 20},
    {"temperature": 0, "logprobs": True, "top_logprobs": 2, "logit_bias": {9: 100}},
    {"top_k": 50, "top_p": 0.9, "temperature": 2},
    {"temperature": 0.3},
    {"repetition_penalty": 1.8, "frequency_penalty": 0.5},
    {"repetition_penalty": 0.6, "top_p": 0.8, "logprobs": True, "top_logprobs": 2},
    {"infill": [[5, 6], 12, [7], 7, [9] * 4], "top_k": 40, "logprobs": True, "top_logprobs": 2},
    {"structured_outputs": {"regex": "[0-9]{4}[!-'][!-9]+;"}},
    {"structured_outputs": {"regex": "[0-9]{8}"}, "top_p": 0.7, "logit_bias": {73: 4.0}, "logprobs": True, "top_logprobs": 2},
]


@pytest.fixture(scope="module")
def every_kind_alone(pair) -> list[tuple[list[int], SamplingConfig, Generation]]:
    configs = [SamplingConfig(seed=seed, **RANDOM, **kind) for seed, kind in enumerate(EVERY_KIND)]
    prompts = [prompt_of(3 + 4 * seed) for seed in range(len(configs))]
    return [(prompt, config, *pair[0].generate([prompt], config)) for prompt, config in zip(prompts, configs, strict=True)]


@pytest.mark.parametrize(("max_sequences", "chunk_rows"), [(3, 1024), (16, 1024), (16, 7)])
def test_every_mix_of_rows_gives_each_what_it_gets_alone(every_kind_alone, max_sequences, chunk_rows, tmp_path):
    """Also when slots pass from one kind of row to another, and when chunks of head rows end within canvases."""
    llm = llm_of(random_checkpoint(tmp_path, seed=8), max_sequences=max_sequences)
    llm._engine.scheduler._loop.head_rows = chunk_rows
    prompts, configs, expected = zip(*every_kind_alone, strict=True)
    for config, result, alone in zip(configs, llm.generate(prompts, configs), expected, strict=True):
        assert (result.token_ids, result.num_steps) == (alone.token_ids, alone.num_steps)
        assert (result.logprobs is None) == (not config.logprobs)
        assert (result.top_logprobs is None) == (not config.top_logprobs)
        if config.logprobs:
            assert result.logprobs == pytest.approx(alone.logprobs, rel=0, abs=LOGPROB_TOLERANCE)


def test_a_compiled_engine_gives_what_the_plain_loop_gives(engine_dir):
    """Of requests of every kind, together."""
    configs = [SamplingConfig(seed=seed, **RANDOM, **kind) for seed, kind in enumerate(EVERY_KIND)]
    # Without special tokens, one of which stands for an image.
    prompts = [[max(token, 20) for token in prompt_of(3 + 4 * seed)] for seed in range(len(configs))]
    expected = llm_of(TINY).generate(prompts, configs)
    for own, other in zip(LLM(engine_dir).generate(prompts, configs), expected, strict=True):
        assert (own.token_ids, own.num_steps) == (other.token_ids, other.num_steps)
        assert (own.logprobs is None) == (other.logprobs is None) and (own.top_logprobs is None) == (other.top_logprobs is None)
        assert (own.logprobs or []) == pytest.approx(other.logprobs or [], rel=0, abs=LOGPROB_TOLERANCE)
        for alternatives, others in zip(own.top_logprobs or (), other.top_logprobs or (), strict=True):
            values = [value for _, value in others]
            assert [value for _, value in alternatives] == pytest.approx(values, rel=0, abs=LOGPROB_TOLERANCE)
            assert alternatives[0][0] == others[0][0]


@pytest.mark.parametrize("chunk_rows", [2048, 95])
def test_a_neighbour_with_extras_changes_no_bit_of_a_row(chunk_rows, engine_dir):
    """On the compiled engine; also where one row of the head would be left over."""
    llm = LLM(engine_dir, max_sequences=3)
    scheduler, loop = llm._engine.scheduler, llm._engine.scheduler._loop
    loop.head_rows = chunk_rows

    def after_two_steps(*configs: SamplingConfig) -> list[torch.Tensor]:
        """The state of the last of them."""
        jobs = [scheduler.add([5, 6, 7], config.resolve(llm._engine.defaults), lambda output: None) for config in configs]
        while jobs[-1].slot < 0 or loop.num_steps(jobs[-1].slot) < 2:
            scheduler.tick()
        slot = jobs[-1].slot
        state = [tensor[slot].clone() for tensor in (loop._soft_embeds, loop._canvas, loop._argmax)]
        for job in jobs:
            scheduler.cancel(job)
        return state

    *others, own = [SamplingConfig(seed=seed, confidence_threshold=0) for seed in (1, 2, 3)]
    asking = [replace(others[0], logprobs=True, infill=[[5], 20, [6]]), others[1], own]
    for state, expected in zip(after_two_steps(*asking), after_two_steps(own), strict=True):
        assert torch.equal(state, expected)


def test_a_bias_outside_the_vocabulary(pair):
    with pytest.raises(RequestError) as raised:
        one(pair[0], logit_bias={5: 1, 97: 1})
    assert str(raised.value) == "logit_bias: got token id 97, expected 0 to 96"
    assert raised.value.code == "INVALID_ARGUMENT"


def test_a_given_token_outside_the_vocabulary(pair):
    with pytest.raises(RequestError, match=r"^infill: got token id 97, expected 0 to 96$"):
        one(pair[0], infill=[2, [97]])
