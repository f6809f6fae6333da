"""Top-k, top-p and min-p against transformers' warpers, worked-out cases and the frequencies they should give."""

import math

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from backend.logit_filters import filtered_sample
from backend.noise import gumbel_noise

pytestmark = pytest.mark.usefixtures("two_threads_an_operation")

FILTERS = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 0.5},
    {"top_k": 20, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.01},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.02},
]
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def logits_of(*shape: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def noise_of(num_rows: int, vocab_size: int, seed: int = 1) -> torch.Tensor:
    return gumbel_noise(seed=seed, canvas_index=0, step=0, canvas_length=num_rows, vocab_size=vocab_size)


def probabilities(*values: float) -> torch.Tensor:
    return torch.tensor([values]).log()


def kept(processed: torch.Tensor, **filters) -> list[int]:
    """The tokens that one row of logits may give: each is the one that noise favours, in turn."""
    vocab_size = processed.shape[-1]
    drawn = filtered_sample(processed.expand(vocab_size, -1), 50.0 * torch.eye(vocab_size), **filters)
    return [token for token in range(vocab_size) if drawn[token] == token]


def warped(processed: torch.Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """`processed` with -infinity where transformers removes a token, warpers in the order of its `generate`."""
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(None, processed)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("vocab_size", "scale"), [(63, 0.1), (257, 3.0), (4096, 8.0)])
def test_samples_are_those_of_transformers_warpers(filters, vocab_size, scale):
    processed, noise = logits_of(200, vocab_size, scale=scale), noise_of(200, vocab_size)
    before = processed.clone(), noise.clone()
    expected = (warped(processed, **filters) + noise).argmax(dim=-1)
    assert torch.equal(filtered_sample(processed, noise, **filters), expected)
    assert torch.equal(processed, before[0]) and torch.equal(noise, before[1])


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_tokens_kept_are_those_of_transformers_warpers(filters):
    processed = logits_of(1, 63)
    assert kept(processed, **filters) == warped(processed, **filters)[0].isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (OFF, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 3}, [0, 1, 3, 4]),  # the third and fourth are equal: both stay
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 100}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.0}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [0, 1, 3, 4]),
        ({"top_p": 0.91}, [0, 1, 2, 3, 4]),
        ({"min_p": 1.0}, [1]),
        ({"min_p": 0.74}, [1, 3]),
        ({"min_p": 0.76}, [1]),
        ({"min_p": 0.249}, [0, 1, 3, 4]),
        ({"top_k": 2, "top_p": 0.57}, [1]),  # 0.4 of 0.7 is 0.571
        ({"top_k": 2, "top_p": 0.58}, [1, 3]),
        ({"top_p": 0.71, "min_p": 0.26}, [1, 3]),
    ],
    ids=str,
)
def test_by_hand(filters, expected):
    assert kept(probabilities(0.1, 0.4, 0.1 * 0.99, 0.3, 0.1), **filters) == expected


def test_equal_tokens_stay_or_go_together():
    assert kept(torch.zeros(1, 7), top_k=3) == list(range(7))
    assert kept(torch.zeros(1, 7), top_p=0.01) == list(range(7))


def test_forbidden_tokens_are_never_drawn():
    """Also where the filters would keep more tokens than are left."""
    processed = torch.full((1, 6), -math.inf)
    processed[0, [2, 4]] = torch.tensor([0.0, -1.0])
    for filters in ({"top_k": 4}, {"top_p": 0.999}, {"min_p": 1e-6}):
        assert kept(processed, **filters) == [2, 4]


def test_filters_that_are_off_change_nothing():
    processed, noise = logits_of(64, 257), noise_of(64, 257)
    assert torch.equal(filtered_sample(processed, noise, **OFF), (processed + noise).argmax(dim=-1))


def test_a_row_does_not_depend_on_the_others():
    processed, noise = logits_of(50, 257), noise_of(50, 257)
    filters = {"top_k": 40, "top_p": 0.6, "min_p": 0.01}
    together = filtered_sample(processed, noise, **filters)
    alone = [filtered_sample(processed[row : row + 1], noise[row : row + 1], **filters).item() for row in range(50)]
    assert together.tolist() == alone


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.75}, {"min_p": 0.3}, {"top_k": 4, "top_p": 0.8}], ids=str)
def test_frequencies(filters):
    """Of 40,000 draws; four standard deviations of a frequency are 0.01 at most. That the seed is fixed makes it certain."""
    processed = probabilities(0.05, 0.35, 0.2, 0.25, 0.15)
    draws = filtered_sample(processed.expand(40_000, -1), noise_of(40_000, 5), **filters)
    frequencies = torch.bincount(draws, minlength=5) / 40_000
    expected = warped(processed, **filters).softmax(dim=-1)[0]
    assert torch.equal(frequencies > 0, expected > 0)
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.01)
