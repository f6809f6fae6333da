"""Proof ladder, rung 4: whole generations against transformers' `generate`, token for token, with the same noise."""

import pytest
import torch
from oracles import Oracle
from small_checkpoints import TINY, network_session, random_checkpoint
from test_network import SHAPES
from tokenizers import Tokenizer

from backend import LLM, SamplingConfig
from backend.engine import Engine, EngineLimits
from backend.generation_defaults import GenerationDefaults

WINDOW = 24  # of the random checkpoints
LENGTHS = (1, 9, WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW + 3)
RANDOM = {"max_tokens": 40, "max_denoising_steps": 8}  # three canvases of 16, the last one cut


def llm_of(checkpoint, **limits) -> LLM:
    session = network_session(checkpoint, page_size=8)
    defaults = GenerationDefaults.from_json(checkpoint / "generation_config.json")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return LLM.from_engine(Engine(session, tokenizer, defaults, EngineLimits(**limits)))


def prompt_of(length: int, vocab_size: int = 97) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def expected_of(oracle: Oracle, prompt: list[int], seed: int, *, greedy: bool = False):
    return oracle.generate(
        prompt, seed=seed, greedy=greedy, max_new_tokens=40, max_denoising_steps=8, eos_token_id=None, pad_token_id=None
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_random_checkpoints_of_many_shapes(shape, tmp_path):
    checkpoint = random_checkpoint(tmp_path, seed=7, **SHAPES[shape])
    llm, oracle = llm_of(checkpoint), Oracle(checkpoint)
    for length in (3, 2 * WINDOW + 1):
        expected = expected_of(oracle, prompt_of(length), seed=length)
        [result] = llm.generate([prompt_of(length)], SamplingConfig(seed=length, **RANDOM))
        assert result.token_ids == expected.token_ids(max_tokens=40, ends=set())
        assert result.num_steps == expected.num_steps
        assert (result.finish_reason, result.num_prompt_tokens) == ("length", length)


@pytest.fixture(scope="module")
def random_pair(tmp_path_factory):
    checkpoint = random_checkpoint(tmp_path_factory.mktemp("random"), seed=8)
    return checkpoint, Oracle(checkpoint)


@pytest.mark.parametrize("length", LENGTHS)
def test_prompts_around_the_window(length, random_pair):
    checkpoint, oracle = random_pair
    expected = expected_of(oracle, prompt_of(length), seed=3)
    [result] = llm_of(checkpoint).generate([prompt_of(length)], SamplingConfig(seed=3, **RANDOM))
    assert result.token_ids == expected.token_ids(max_tokens=40, ends=set())


def test_temperature_0_is_transformers_with_the_argmax_as_sample(random_pair):
    checkpoint, oracle = random_pair
    expected = expected_of(oracle, prompt_of(30), seed=4, greedy=True)
    [result] = llm_of(checkpoint).generate([prompt_of(30)], SamplingConfig(seed=4, temperature=0, **RANDOM))
    assert result.token_ids == expected.token_ids(max_tokens=40, ends=set())


def test_the_seed_decides(random_pair):
    """All 64 bits of it; the same seed gives the same tokens."""
    llm, prompt = llm_of(random_pair[0]), prompt_of(9)
    configs = [SamplingConfig(seed=seed, **RANDOM) for seed in (3, 3, 4, 3 + 2**32, 2**64 - 1)]
    first, same, *others = (tuple(result.token_ids) for result in llm.generate([prompt] * 5, configs))
    assert first == same
    assert len({first, *others}) == 4


@pytest.mark.usefixtures("two_threads_an_operation")
@pytest.mark.parametrize("max_sequences", [1, 2, 16])
def test_rows_of_one_batch_are_what_they_are_alone(max_sequences, random_pair):
    """Unequal prompts, seeds, steps and lengths at once; with fewer slots than requests, rows join while others go on."""
    checkpoint, oracle = random_pair
    configs = [
        SamplingConfig(seed=seed, max_tokens=tokens, max_denoising_steps=steps)
        for seed, tokens, steps in ((1, 40, 8), (2, 7, 3), (3, 16, 5), (4, 17, 8), (5, 33, 2), (6, 40, 6))
    ]
    results = llm_of(checkpoint, max_sequences=max_sequences).generate([prompt_of(length) for length in LENGTHS], configs)
    for length, config, result in zip(LENGTHS, configs, results, strict=True):
        expected = oracle.generate(
            prompt_of(length),
            seed=config.seed,
            max_new_tokens=config.max_tokens,
            max_denoising_steps=config.max_denoising_steps,
            eos_token_id=None,
            pad_token_id=None,
        )
        assert result.token_ids == expected.token_ids(max_tokens=config.max_tokens, ends=set())


def test_few_kv_pages_make_requests_wait_not_fail(random_pair):
    checkpoint, _ = random_pair
    prompts, config = [prompt_of(length) for length in LENGTHS], SamplingConfig(seed=1, **RANDOM)
    roomy, tight = llm_of(checkpoint), llm_of(checkpoint, max_cached_tokens=160)
    assert [each.token_ids for each in tight.generate(prompts, config)] == [
        each.token_ids for each in roomy.generate(prompts, config)
    ]


@pytest.mark.usefixtures("two_threads_an_operation")
def test_the_tiny_checkpoint_compiled(engine_dir, held_out, render):
    """The trained checkpoint converges and ends its answers: tokens and steps of every canvas, from the compiled engine."""
    llm, oracle = LLM(engine_dir), Oracle(TINY)
    ends = set(GenerationDefaults.from_json(TINY / "generation_config.json").eos_token_ids)
    prompts = [render(question) for question in held_out]
    configs = [SamplingConfig(seed=seed, max_tokens=128) for seed in range(len(prompts))]
    results = llm.generate(prompts, configs)
    for seed, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        prompt_ids = llm.tokenizer.encode(prompt, add_special_tokens=False).ids
        expected = oracle.generate(prompt_ids, seed=seed, max_new_tokens=128, pad_token_id=None)
        assert result.token_ids == expected.token_ids(max_tokens=128, ends=ends)
        assert result.num_steps == expected.num_steps
    assert any(len(result.num_steps) > 1 for result in results), "no answer filled a canvas"
    assert all(num_steps < 48 for result in results for num_steps in result.num_steps), "a canvas did not converge"
