"""Biases, filters and log probabilities where the logits are: described only, and, where there is one, on a CUDA device."""

import pytest
import torch

from backend import sampler
from backend.logit_filters import filtered_sample
from backend.logprobs import top_logprobs
from backend.noise import gumbel_noise

NUM_ROWS, VOCAB_SIZE = 40, 4099
FILTERS = [{"top_k": 20}, {"top_p": 0.7}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9, "min_p": 0.01}]


def vocabulary_pass(logits: torch.Tensor, noise: torch.Tensor) -> sampler.VocabularyPass:
    device = logits.device
    bias = sampler.LogitBias(3, 30, torch.tensor([5, 4000], device=device), torch.tensor([-100.0, 2.5], device=device))
    temperature = torch.full((NUM_ROWS,), 0.7, device=device)
    return sampler.vocabulary_pass(logits, cap=30.0, temperature=temperature, noise=noise, bias=[bias])


def test_everything_stays_on_the_device_of_the_logits():
    """Meta tensors refuse to be read, and to be mixed with those of another device."""
    logits, noise = (torch.empty(NUM_ROWS, VOCAB_SIZE, device="meta") for _ in range(2))
    result = vocabulary_pass(logits, noise)
    drawn = filtered_sample(result.processed, noise, top_k=20, min_p=0.1)
    alternatives = top_logprobs(result.processed, result.argmax, result.logprob, 20)
    assert {each.device.type for each in (*result, drawn, *alternatives)} == {"meta"}
    with pytest.raises(RuntimeError):
        filtered_sample(result.processed, torch.empty(NUM_ROWS, VOCAB_SIZE))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_the_cpu_gives():
    """Tokens are equal; the logits are far enough apart for different roundings of tanh and exp not to decide."""
    logits = torch.randn(NUM_ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 5
    noise = gumbel_noise(seed=1, canvas_index=0, step=0, canvas_length=NUM_ROWS, vocab_size=VOCAB_SIZE)
    expected = vocabulary_pass(logits, noise)
    actual = vocabulary_pass(logits.cuda(), noise.cuda())
    for name in ("argmax", "sampled"):
        assert torch.equal(getattr(actual, name).cpu(), getattr(expected, name))
    for name in ("processed", "entropy", "logprob"):
        torch.testing.assert_close(getattr(actual, name).cpu(), getattr(expected, name), rtol=1e-5, atol=1e-5)
    for filters in FILTERS:
        drawn = filtered_sample(actual.processed, noise.cuda(), **filters)
        assert torch.equal(drawn.cpu(), filtered_sample(expected.processed, noise, **filters))
    token_ids, values = top_logprobs(actual.processed, actual.argmax, actual.logprob, 20)
    expected_ids, expected_values = top_logprobs(expected.processed, expected.argmax, expected.logprob, 20)
    assert torch.equal(token_ids.cpu(), expected_ids)
    torch.testing.assert_close(values.cpu(), expected_values, rtol=1e-5, atol=1e-5)
