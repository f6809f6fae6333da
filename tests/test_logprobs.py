"""Log probabilities against torch's log_softmax, and their order."""

import math

import pytest
import torch

from backend import sampler
from backend.job import TokenLogprob
from backend.logprobs import CanvasLogprobs, top_logprobs


def step(num_rows: int, vocab_size: int, *, scale: float = 4.0, seed: int = 0) -> sampler.VocabularyPass:
    raw = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    return sampler.vocabulary_pass(raw, cap=30.0, temperature=torch.full((num_rows,), 0.5), noise=None)


@pytest.mark.parametrize("scale", [0.01, 4.0, 200.0])
@pytest.mark.parametrize(("vocab_size", "count"), [(2, 2), (63, 20), (4096, 1)])
def test_top_logprobs_equal_log_softmax(vocab_size, count, scale):
    result = step(9, vocab_size, scale=scale)
    expected, expected_ids = result.processed.log_softmax(dim=-1).topk(count)
    token_ids, values = top_logprobs(result.processed, result.argmax, result.logprob, count)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.logprob, expected[:, 0], rtol=1e-6, atol=1e-6)
    if scale == 4.0:  # few equal logits
        assert torch.equal(token_ids, expected_ids)
    assert torch.equal(token_ids[:, 0], result.argmax)


def test_the_argmax_comes_first_among_equals():
    processed = torch.zeros(3, 63)
    processed[1, 40] = 1
    argmax = processed.argmax(dim=-1)
    token_ids, values = top_logprobs(processed, argmax, processed.log_softmax(dim=-1).amax(dim=-1), 4)
    assert token_ids[:, 0].tolist() == argmax.tolist() == [0, 40, 0]
    assert all(len(set(row)) == 4 for row in token_ids.tolist())
    torch.testing.assert_close(values[0], -torch.full((4,), 63.0).log())


def test_a_canvas_by_hand():
    """Recorded in two parts, as chunks of rows come, and overwritten by the next step."""
    logprobs = CanvasLogprobs(3, 2, torch.device("cpu"))
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.1, 0.3, 0.6]])
    for processed in (torch.zeros(3, 3), probabilities.log()):
        result = sampler.vocabulary_pass(processed, cap=None, temperature=torch.ones(3), noise=None)
        for part in (slice(0, 1), slice(1, 3)):
            logprobs.record(part, result.processed[part], result.argmax[part], result.logprob[part])
    first, second, third = logprobs.tolist()
    assert (first.top[0][0], second.top[0][0]) == (0, 1)
    assert [value for _, value in first.top] == pytest.approx([math.log(0.5), math.log(0.25)], abs=1e-6)
    assert [value for _, value in second.top] == pytest.approx([math.log(0.75), math.log(0.125)], abs=1e-6)
    assert third.top == [(2, pytest.approx(math.log(0.6), abs=1e-6)), (1, pytest.approx(math.log(0.3), abs=1e-6))]
    assert all(each.logprob == each.top[0][1] for each in (first, second, third))


def test_no_alternatives_unless_asked():
    logprobs, result = CanvasLogprobs(4, 0, torch.device("cpu")), step(4, 63)
    logprobs.record(slice(0, 4), result.processed, result.argmax, result.logprob)
    assert logprobs.tolist() == [TokenLogprob(value, []) for value in result.logprob.tolist()]
