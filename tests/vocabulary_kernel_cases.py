"""The cases of `test_vocabulary_kernels.py`, which runs this file in Triton's interpreter (TRITON_INTERPRET=1)."""

# ruff: noqa: N803 - constants are in capitals

import math

import pytest
import torch
import triton
import triton.language as tl
from triton_interpreter import save_the_interpreters_time

from backend import noise, sampler
from plugins.vocabulary.launch import accept_and_renoise, vocabulary_pass
from plugins.vocabulary.noise_kernel import gumbel_from_words, gumbel_words

save_the_interpreters_time()

# numpy's, about tokens that have no chance: a bound of infinity is meant, and so is no bound where every token is forbidden.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered"),
]

VOCAB_SIZES = (97, 448, 5000)
# Sums over the vocabulary of float32 terms, whose total is at most ln(V), taken in another order: a few roundings of it.
ENTROPY_TOLERANCE = {"rtol": 4e-6, "atol": 8e-6}
# Another logarithm, each of a rounding or two, over values of up to 23; where the outer one crosses 0, of its argument near 1.
GUMBEL_TOLERANCE = {"rtol": 5e-7, "atol": 5e-7}
SEEDS = [noise.seed_bits(seed) for seed in (0, 1, (1 << 63) + 12345, (1 << 64) - 1)]


@triton.jit
def gumbel_kernel(seed, canvas_index, step, position, first_lane, words, values, BLOCK: tl.constexpr):
    drawn = gumbel_words(tl.load(seed), tl.load(canvas_index), tl.load(step), tl.load(position), tl.load(first_lane), BLOCK)
    tl.store(words + tl.arange(0, BLOCK), drawn.to(tl.int64))
    tl.store(values + tl.arange(0, BLOCK), gumbel_from_words(drawn))


@triton.jit
def from_words_kernel(words, values, BLOCK: tl.constexpr):
    tl.store(values + tl.arange(0, BLOCK), gumbel_from_words(tl.load(words + tl.arange(0, BLOCK)).to(tl.uint32)))


def draws(num_rows: int) -> dict[str, torch.Tensor]:
    """What the noise of each row depends on, at the ends of every range."""
    each = torch.arange(num_rows)
    return {
        "seeds": torch.tensor(SEEDS)[each % 4],
        "canvas_indices": torch.tensor([0, 1, (1 << 30) - 1])[each % 3],
        "steps": torch.tensor([0, 47, (1 << 32) - 1, 5, 6])[each % 5],
    }


@pytest.mark.parametrize("first_lane", [0, 64, 262144 - 64])
def test_noise_has_the_bits_of_the_plain_noise(first_lane):
    for row in range(5):
        drawn = {name: value[row : row + 1] for name, value in draws(5).items()}
        position = torch.tensor([(0, 255, 7, 8, 9)[row]])
        words, values = torch.full((64,), -1), torch.full((64,), float("nan"))
        gumbel_kernel[(1,)](*drawn.values(), position, torch.tensor([first_lane]), words, values, BLOCK=64)

        lanes = torch.arange(first_lane, first_lane + 64)
        seed = drawn["seeds"]
        counter = (lanes // 4, position, drawn["steps"], drawn["canvas_indices"] | 2 << 30)
        expected = torch.stack(noise.philox_4x32_10(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)))
        assert torch.equal(words, expected[lanes % 4, torch.arange(64)])
        whole = noise.gumbel_noise_rows(*drawn.values(), position, first_lane + 64)
        torch.testing.assert_close(values, whole[0, first_lane:], **GUMBEL_TOLERANCE)


def test_gumbel_values_of_the_extreme_words():
    """Both ends of the range, and words around those where 1 - v rounds to 1 and where the value crosses 0."""
    at = torch.tensor([0, 1, 2, 255, 256, 257, 2714937127, 2714937128, 2714937129, (1 << 32) - 257, (1 << 32) - 1])
    words = torch.cat([at, torch.randint(0, 1 << 9, (5,)), torch.randint(0, 1 << 32, (16,))])
    values = torch.full((32,), float("nan"))
    from_words_kernel[(1,)](words, values, BLOCK=32)
    v = ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).double()
    torch.testing.assert_close(values.double(), -(-(-v).log1p()).log(), **GUMBEL_TOLERANCE)
    assert values[0].item() == pytest.approx(22.87, abs=0.01) and values[10].item() == pytest.approx(-2.81, abs=0.01)


def logits(rows, vocab_size, dtype, scale=8.0):
    return (torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * scale).to(dtype)


def check(raw, cap, temperature, greedy):
    rows = raw.shape[0]
    drawn, positions = draws(rows), torch.arange(rows) * 37 % 256
    random = noise.gumbel_noise_rows(*drawn.values(), positions, raw.shape[1])
    expected = sampler.vocabulary_pass(raw, cap=cap, temperature=temperature, noise=random)
    actual = vocabulary_pass(raw, cap=cap, temperature=temperature, greedy=greedy, positions=positions, **drawn)
    assert torch.equal(actual.argmax, expected.argmax)
    assert torch.equal(actual.sampled, torch.where(greedy, expected.argmax, expected.sampled))
    torch.testing.assert_close(actual.entropy, expected.entropy, **ENTROPY_TOLERANCE)
    rounding = 2.0**-23 * expected.processed[expected.processed.isfinite()].abs().max().item()  # of an exponent
    torch.testing.assert_close(actual.logprob, expected.logprob, rtol=4e-6, atol=8e-6 + rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [30.0, None])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_vocabulary_pass(vocab_size, cap, dtype):
    rows = 5
    temperature = torch.tensor([0.4, 0.8, 1.0, 0.01, 2.0])
    check(logits(rows, vocab_size, dtype), cap, temperature, torch.arange(rows) % 3 == 1)


def test_a_vocabulary_of_two_tiles():
    check(logits(3, 17000, torch.bfloat16), 30.0, torch.tensor([0.4, 0.8, 2.0]), torch.arange(3) == 1)


def test_entropies_near_zero_and_near_the_largest():
    """A row that is all but certain, a uniform one, and one whose tiles have very different maxima."""
    raw = torch.zeros(3, 5000)
    raw[0, 4500], raw[2, :4096] = 25.0, -25.0
    check(raw, 30.0, torch.tensor([0.4, 0.4, 0.4]), torch.zeros(3, dtype=torch.bool))


def test_the_first_of_equal_logits_wins_within_and_between_tiles():
    raw = torch.zeros(3, 17000)
    raw[1, [77, 78, 5000]] = 3.0
    raw[2, [16384, 16999]] = 3.0
    temperature, zeros = torch.ones(3), torch.zeros(3, dtype=torch.int64)
    drawn = dict.fromkeys(("seeds", "canvas_indices", "steps", "positions"), zeros)
    result = vocabulary_pass(raw, cap=30.0, temperature=temperature, greedy=torch.ones(3, dtype=torch.bool), **drawn)
    assert result.argmax.tolist() == result.sampled.tolist() == [0, 77, 16384]
    assert result.entropy[0].item() == pytest.approx(math.log(17000), rel=1e-6)


def test_tokens_that_are_almost_as_likely_as_each_other():
    """Rows of equal logits, of logits that differ by little, and of two tokens that leave the rest no chance."""
    raw = torch.zeros(12, 3000)
    raw[4:8] = 29.0 + 1e-3 * torch.randperm(3000, generator=torch.Generator().manual_seed(1)) / 8
    raw[8:, [1100, 2100]] = 29.0
    for temperature in (0.01, 1.0):
        check(raw, 30.0, torch.full((12,), temperature), torch.zeros(12, dtype=torch.bool))


def test_forbidden_tokens():
    """Logits of -infinity, uncapped: a few, a whole tile of them, and all but one."""
    raw = logits(3, 17000, torch.float32)
    raw[0, [3, 16999]] = raw[1, :16384] = raw[2] = float("-inf")
    raw[2, 16942] = -1.5
    check(raw, None, torch.full((3,), 0.7), torch.zeros(3, dtype=torch.bool))


def canvases(num_sequences, length, vocab_size):
    torch.manual_seed(length)
    entropy = torch.rand(num_sequences, length) ** 4 * 3
    argmax = torch.randint(0, vocab_size, entropy.shape)
    previous = argmax.clone()
    previous[1::3, -1] += 1
    each = torch.arange(num_sequences)
    return {
        "entropy": entropy,
        "argmax": argmax,
        "sampled": torch.randint(0, vocab_size, entropy.shape),
        "bound": torch.tensor([0.1, 0.0, 5.0, 1e9])[each % 4],
        "confidence_threshold": torch.where(each % 2 == 0, 100.0, 0.01),
        "previous_argmax": previous,
        "stable_steps": each % 3,
        "stability_threshold": torch.tensor([0, 1, 2])[each % 3],
        **draws(num_sequences),
    }


def check_acceptance(inputs, vocab_size):
    within = torch.arange(inputs["entropy"].shape[1])
    ascending, order = inputs["entropy"].sort(dim=-1, stable=True)
    kept = ascending.cumsum(dim=-1) - ascending <= inputs["bound"][:, None]
    mask = torch.zeros_like(kept).scatter_(-1, order, kept)
    assert torch.equal(mask.sum(-1), sampler.accept(inputs["entropy"], inputs["bound"]).sum(-1))
    drawn = (inputs[name][:, None] for name in ("seeds", "canvas_indices", "steps"))
    canvas = sampler.next_canvas(mask, inputs["sampled"], noise.renoise_tokens_rows(*drawn, within, vocab_size))
    names = ("previous_argmax", "stable_steps", "stability_threshold", "confidence_threshold")
    state = {{"previous_argmax": "previous_argmax_canvas"}.get(name, name): inputs[name] for name in names}
    expected = sampler.converged(inputs["argmax"], inputs["entropy"], **state)

    actual = accept_and_renoise(**inputs, vocab_size=vocab_size)
    assert torch.equal(actual.canvas, canvas)
    assert torch.equal(actual.stable_steps, expected.stable_steps)
    assert torch.equal(actual.converged, expected.converged)
    return actual


@pytest.mark.parametrize("vocab_size", [97, 262144])
@pytest.mark.parametrize("length", [1, 63, 256])
def test_acceptance(length, vocab_size):
    actual = check_acceptance(canvases(12, length, vocab_size), vocab_size)
    assert actual.converged.any() and not actual.converged.all()


def test_acceptance_of_equal_entropies_takes_the_left_ones_first():
    inputs = canvases(4, 64, 1 << 20)
    inputs["entropy"] = inputs["entropy"].mul(4).round() / 8
    inputs["entropy"][0] = 0.25
    inputs["bound"][:] = torch.tensor([1.0, 0.5, 2.0, 0.0])
    actual = check_acceptance(inputs, 1 << 20)
    assert (actual.canvas == inputs["sampled"])[0].tolist() == [True] * 5 + [False] * 59
