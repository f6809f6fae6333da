"""`LLM` on the compiled tiny engine: where results end, what is refused, what prompts may be."""

from dataclasses import replace

import numpy as np
import pytest
from small_checkpoints import TINY

from backend import LLM, RequestError, SamplingConfig
from backend.generation_defaults import GenerationDefaults

COUNT = "<bos><|turn>user\nCount from 3 to 31.<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
ANSWER = " ".join(str(number) for number in range(3, 32))
CANVAS = 32


@pytest.fixture(scope="module")
def llm(engine_dir) -> LLM:
    return LLM(engine_dir)


def one(llm: LLM, **sampling):
    [result] = llm.generate(COUNT, SamplingConfig(**{"seed": 1, **sampling}))
    return result


def test_an_answer_over_several_canvases(llm):
    result = one(llm)
    assert (result.text, result.finish_reason) == (ANSWER, "stop")
    assert len(result.num_steps) == -(-len(result.token_ids) // CANVAS)
    assert result.num_prompt_tokens == len(llm.tokenizer.encode(COUNT, add_special_tokens=False).ids)


@pytest.mark.parametrize("max_tokens", [1, CANVAS - 1, CANVAS, CANVAS + 1, 2 * CANVAS])
def test_max_tokens_is_exact(llm, max_tokens):
    result = one(llm, max_tokens=max_tokens)
    assert (result.token_ids, result.finish_reason) == (one(llm).token_ids[:max_tokens], "length")
    assert len(result.num_steps) == -(-max_tokens // CANVAS)


def test_the_checkpoints_256_tokens_are_a_default_not_a_cap(llm):
    assert len(one(llm, ignore_eos=True, max_denoising_steps=2).token_ids) == 256
    assert len(one(llm, ignore_eos=True, max_denoising_steps=2, max_tokens=300).token_ids) == 300


def test_end_tokens_end_and_are_not_part_of_the_result(llm):
    ends = GenerationDefaults.from_json(TINY / "generation_config.json").eos_token_ids
    assert not set(one(llm).token_ids) & set(ends)
    assert set(one(llm, ignore_eos=True, max_tokens=128).token_ids) & set(ends)


@pytest.mark.parametrize("stop", ["9 10", " 2", "31", "8 19 2"])
def test_stop_strings(llm, stop):
    result = one(llm, stop=stop)
    assert (result.text, result.finish_reason) == (ANSWER[: ANSWER.index(stop)], "stop")
    assert llm.tokenizer.decode(result.token_ids) == result.text


def test_stop_token_ids(llm):
    five = llm.tokenizer.token_to_id("5")
    result = one(llm, stop_token_ids=[five])
    assert (result.text, result.finish_reason) == ("3 4 ", "stop")


def test_greedy_is_deterministic_for_a_seed(llm):
    assert one(llm, temperature=0, seed=5) == one(llm, temperature=0, seed=5)
    assert one(llm, temperature=0, seed=5).text == ANSWER


def test_a_banned_token_is_written_another_way_or_not_at_all(llm):
    five = llm.tokenizer.token_to_id("5")
    assert five in one(llm).token_ids
    result = one(llm, logit_bias={five: -100})
    assert five not in result.token_ids and result.text.startswith("3 4 ")


def test_filters_leave_a_sure_answer_as_it_is(llm):
    assert one(llm, top_k=5, top_p=0.9, min_p=0.05).text == ANSWER
    assert one(llm, top_k=1) == one(llm, temperature=0)


@pytest.mark.parametrize("stop", [[], ["8 19 2"], ["31 x"]])
def test_logprobs_come_with_their_tokens(llm, stop):
    """Also of tokens that are held back while they may begin a stop string, and of none beyond the result."""
    result = one(llm, stop=stop, logprobs=True, top_logprobs=3)
    assert len(result.token_ids) == len(result.logprobs) == len(result.top_logprobs)
    assert replace(result, logprobs=None, top_logprobs=None) == one(llm, stop=stop)
    for token, logprob, top in zip(result.token_ids, result.logprobs, result.top_logprobs, strict=True):
        assert top[0] == (token, logprob)
        assert 0 >= logprob >= top[1][1] >= top[2][1]
        assert len({alternative for alternative, _ in top}) == 3
    assert sum(result.logprobs) / len(result.logprobs) > -0.01, "the trained model is sure of this answer"


def test_log_probabilities_that_are_sent_are_not_kept(llm):
    """A long answer's, with twenty alternatives each, would be hundreds of megabytes."""
    engine, sent, kept = llm._engine, [], []
    config = SamplingConfig(seed=1, logprobs=True, top_logprobs=2).resolve(engine.defaults)
    job = engine.scheduler.add(engine.tokenize(COUNT), config, sent.append)
    while not job.ended:
        engine.scheduler.tick()
        kept.append(len(job.logprobs))
    assert [len(output.logprobs) for output in sent] == [len(output.token_ids) for output in sent]
    assert len(sent) > 1 and sent[0].logprobs and max(kept) == 0


def test_prompts_are_texts_or_token_ids_one_or_many(llm):
    token_ids = llm.tokenizer.encode(COUNT, add_special_tokens=False).ids
    config = SamplingConfig(seed=1)
    expected = llm.generate(COUNT, config)
    assert llm.generate(token_ids, config) == expected
    assert llm.generate([COUNT, token_ids], config) == expected * 2
    assert llm.generate(COUNT.removeprefix("<bos>"), config) == expected
    assert llm.generate([], config) == []


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ("", {}, "prompt: got no tokens, expected at least one"),
        ([[]], {}, "prompt: got no tokens, expected at least one"),
        ([[3, 448]], {}, "prompt: got token id 448, expected 0 to 447"),
        ([[-1]], {}, "prompt: got token id -1"),
        ([[18]], {}, "prompt: got 1 image placeholders (token 18) and 0 images, expected one placeholder for each image"),
        (
            [[5] * 4000],
            {},
            "prompt: got 4000 tokens and max_tokens 256, which is 8 canvases of 32, so 4256 positions, expected at most 4096 "
            "in all; lower max_tokens to 96, or shorten the prompt",
        ),
        ([[5] * 4070], SamplingConfig(max_tokens=1), "4102 positions, expected at most 4096 in all; shorten the prompt"),
        (["a", "b"], [SamplingConfig()], "sampling: got 1 configurations, expected 2"),
        ("a" * 65_537, {}, "prompt: got 65537 characters, expected at most 65536, since the model has 4096 positions"),
        ([[1.5, 2]], {}, "prompt: got [1.5, 2], expected a text or a list of token ids, integers"),
        ([["5", "7"]], {}, "prompt: got ['5', '7'], expected a text or a list of token ids, integers"),
        ([True, False], {}, "prompt: got [True, False], expected a text or a list of token ids, integers"),
        ([b"ab"], {}, "prompt: got b'ab', expected a text or a list of token ids, integers"),
        (b"ab", {}, "prompts: got b'ab', expected a text, a list of token ids, or a list of either"),
        ({"a": 1}, {}, "prompts: got {'a': 1}, expected a text, a list of token ids, or a list of either"),
        (None, {}, "prompts: got None, expected a text, a list of token ids, or a list of either"),
        ("a", {"max_tokens": 4}, "sampling: got {'max_tokens': 4}, expected a SamplingConfig or a list of them"),
        ("a", SamplingConfig(stop_token_ids=[448]), "stop_token_ids: got token id 448, expected 0 to 447"),
    ],
)
def test_refusals(llm, prompt, sampling, message):
    with pytest.raises(RequestError) as raised:
        llm.generate(prompt, sampling or None)
    assert message in str(raised.value)
    assert raised.value.code == "INVALID_ARGUMENT"
    assert one(llm, max_tokens=1).token_ids


def test_refusals_of_streams(llm):
    with pytest.raises(RequestError, match=r"^sampling: got \{'seed': 1\}, expected a SamplingConfig"):
        llm.stream("a", {"seed": 1})
    with pytest.raises(RequestError, match=r"^prompt: got None, expected a text or a list of token ids"):
        llm.stream(None)


def test_token_ids_may_be_numpys(llm):
    [expected] = llm.generate([[2, 100]], SamplingConfig(max_tokens=3, seed=1))
    for prompts in (np.array([2, 100]), [np.array([2, 100])], np.array([[2, 100]])):
        [result] = llm.generate(prompts, SamplingConfig(max_tokens=3, seed=1))
        assert result.token_ids == expected.token_ids


def test_a_prompt_that_no_pages_can_hold(engine_dir):
    with pytest.raises(RequestError, match="need more KV pages than this server has in all"):
        LLM(engine_dir, max_cached_tokens=64).generate([[5] * 100])
