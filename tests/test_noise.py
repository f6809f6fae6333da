"""Noise: published Philox vectors, the documented layout in plain Python, independence of batch and blocks, statistics."""

import math

import pytest
import torch

from backend import noise

SEEDS = (0, 1, 1 << 32, 0x0123456789ABCDEF, (1 << 64) - 1)
# A few float32 roundings through two logarithms, whose own errors differ between libraries and devices by an ulp or two.
GUMBEL_TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.int64) for value in values]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    """The vectors that the Random123 library publishes for philox4x32-10."""
    assert tuple(int(word) for word in noise.philox_4x32_10(words(*counter), words(*key))) == expected


def philox(counter: list[int], key: list[int]) -> list[int]:
    """The generator in Python integers, to check the tensor form away from the published vectors."""
    for _ in range(10):
        product_0, product_1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (product_1 >> 32) ^ counter[1] ^ key[0],
            product_1 % 2**32,
            (product_0 >> 32) ^ counter[3] ^ key[1],
            product_0 % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def plain_gumbel(word: int) -> float:
    v = min((word + 0.5) / 2**32, 1 - 2**-24)
    return -math.log(-math.log1p(-v))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("canvas_index", "step"), [(0, 0), (5, 47), (2**30 - 1, 2**32 - 1)])
def test_documented_layout(seed, canvas_index, step):
    """Every word of the counter and the key, the streams, and the values made of them."""
    key = [seed % 2**32, seed >> 32]
    vocab_size, canvas_length = 7, 3
    names = {"seed": seed, "canvas_index": canvas_index, "canvas_length": canvas_length, "vocab_size": vocab_size}
    for position in range(canvas_length):
        first = philox([0, position, 0, canvas_index], key)[0]
        assert noise.initial_canvas(**names)[position] == first * vocab_size >> 32
        first = philox([0, position, step, 1 << 30 | canvas_index], key)[0]
        assert noise.renoise_tokens(**names, step=step)[position] == first * vocab_size >> 32
        lanes = [philox([group, position, step, 2 << 30 | canvas_index], key) for group in range(2)]
        expected = torch.tensor([plain_gumbel(word) for word in [*lanes[0], *lanes[1]]][:vocab_size])
        torch.testing.assert_close(noise.gumbel_noise(**names, step=step)[position], expected, **GUMBEL_TOLERANCE)


def test_gumbel_of_extreme_words():
    """Finite everywhere; accurate for the small words, which give the large noise, and near enough for the largest."""
    some = [0, 1, 2, 255, 256, 2**16, 2**24 + 1, 2**31, 2**32 - 2**9, 2**32 - 129, 2**32 - 1]
    values = torch.tensor(some).to(torch.float32)
    noise._gumbel_from_words_(values)
    expected = torch.tensor([plain_gumbel(word) for word in some])
    assert values.isfinite().all()
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(values[:8], expected[:8], **GUMBEL_TOLERANCE)
    torch.testing.assert_close(values[8:], expected[8:], rtol=0, atol=0.02)
    assert values[0].item() == pytest.approx(math.log(2**33))  # the documented range
    assert values[-1].item() == pytest.approx(-math.log(24 * math.log(2)))


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 63, 257])
def test_any_subset_is_the_same_numbers(vocab_size):
    names = {"seed": 11, "canvas_index": 2, "step": 3, "canvas_length": 32}
    whole = noise.gumbel_noise(**names, vocab_size=vocab_size)
    assert whole.shape == (32, vocab_size) and whole.dtype == torch.float32
    for positions in (range(0), range(1), range(31, 32), range(3, 30, 7), range(31, -1, -1)):
        assert torch.equal(noise.gumbel_noise(**names, vocab_size=vocab_size, positions=positions), whole[list(positions)])
    wider = noise.gumbel_noise(**names, vocab_size=vocab_size + 5)  # a token lane does not depend on the vocabulary around it
    assert torch.equal(wider[:, :vocab_size], whole)


@pytest.mark.parametrize("counters_per_block", [1, 5, 64, 1 << 20])
def test_blocks_change_nothing(monkeypatch, counters_per_block):
    rows = torch.arange(9)
    whole = noise.gumbel_noise_rows(rows, rows, rows, rows, 63)
    monkeypatch.setitem(noise._COUNTERS_PER_BLOCK, "cpu", counters_per_block)
    assert torch.equal(noise.gumbel_noise_rows(rows, rows, rows, rows, 63), whole)


def test_rows_of_different_requests_equal_each_alone():
    requests = [(seed, canvas_index, step) for seed in SEEDS for canvas_index in (0, 3) for step in (0, 9)]
    seeds, canvas_indices, steps = (
        torch.tensor(column) for column in zip(*((noise.seed_bits(s), c, n) for s, c, n in requests), strict=True)
    )
    positions = torch.arange(8)
    initial = noise.initial_canvas_rows(seeds[:, None], canvas_indices[:, None], positions, 448)
    renoise = noise.renoise_tokens_rows(seeds[:, None], canvas_indices[:, None], steps[:, None], positions, 448)
    flat = [column.repeat_interleave(8) for column in (seeds, canvas_indices, steps)]
    gumbel = noise.gumbel_noise_rows(*flat, positions.repeat(len(requests)), 10).view(len(requests), 8, 10)
    for row, (seed, canvas_index, step) in enumerate(requests):
        names = {"seed": seed, "canvas_index": canvas_index, "canvas_length": 8}
        assert torch.equal(initial[row], noise.initial_canvas(**names, vocab_size=448))
        assert torch.equal(renoise[row], noise.renoise_tokens(**names, step=step, vocab_size=448))
        assert torch.equal(gumbel[row], noise.gumbel_noise(**names, step=step, vocab_size=10))


def test_every_argument_matters():
    base = {"seed": 7, "canvas_index": 0, "step": 0, "canvas_length": 64, "vocab_size": 1000}
    changes = [{}, {"seed": 8}, {"seed": 7 + (1 << 32)}, {"canvas_index": 1}, {"step": 1}]
    canvases = [noise.renoise_tokens(**{**base, **change}) for change in changes]
    canvases.append(noise.initial_canvas(seed=7, canvas_index=0, canvas_length=64, vocab_size=1000))
    for i, first in enumerate(canvases):
        for second in canvases[:i]:
            assert (first == second).sum() <= 3  # chance: 64 / 1000


def test_tokens_are_uniform():
    vocab_size, count = 448, 448 * 400
    names = {"canvas_index": 0, "canvas_length": count, "vocab_size": vocab_size}
    for tokens in (noise.initial_canvas(seed=1, **names), noise.renoise_tokens(seed=2, step=5, **names)):
        assert tokens.dtype == torch.int64 and tokens.min() == 0 and tokens.max() == vocab_size - 1
        chi_square = ((tokens.bincount(minlength=vocab_size) - 400) ** 2 / 400).sum().item()
        degrees = vocab_size - 1
        assert abs(chi_square - degrees) < 4 * math.sqrt(2 * degrees)


def test_gumbel_moments_and_distribution():
    values = noise.gumbel_noise(seed=3, canvas_index=0, step=0, canvas_length=500, vocab_size=1000).double().flatten()
    count = len(values)
    assert values.mean().item() == pytest.approx(0.5772156649, abs=4 * math.sqrt(math.pi**2 / 6 / count))
    assert values.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    uniform = (-(-values).exp()).exp().sort().values  # the distribution function makes it uniform on (0, 1)
    assert uniform.mean().item() == pytest.approx(1 / 2, abs=4 * math.sqrt(1 / 12 / count))
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.001)
    distance = (uniform - (torch.arange(count) + 0.5) / count).abs().max().item()
    assert distance < 1.63 / math.sqrt(count)  # Kolmogorov-Smirnov, 1 %


def test_neighbours_are_uncorrelated():
    values = noise.gumbel_noise(seed=4, canvas_index=0, step=0, canvas_length=256, vocab_size=1024).double()
    later = noise.gumbel_noise(seed=4, canvas_index=0, step=1, canvas_length=256, vocab_size=1024).double()
    pairs = [(values[:, :-1], values[:, 1:]), (values[:-1], values[1:]), (values[:, :-4], values[:, 4:]), (values, later)]
    for first, second in pairs:
        correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(first.numel())


def test_gumbel_argmax_samples_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, -3.0, 1.5])
    count = 100_000
    values = noise.gumbel_noise(seed=5, canvas_index=0, step=0, canvas_length=count, vocab_size=len(logits))
    expected = logits.softmax(-1).double() * count
    observed = (logits + values).argmax(-1).bincount(minlength=len(logits))
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_square < 16.8  # 6 degrees of freedom, 1 %


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed: got -1, expected 0 to 2^64 - 1"),
        ({"seed": 1 << 64}, "seed: got 18446744073709551616, expected 0 to 2^64 - 1"),
        ({"canvas_index": 1 << 30}, "canvas_index: got 1073741824, expected 0 to 2^30 - 1"),
        ({"step": -1}, "step: got -1, expected 0 to 2^32 - 1"),
        ({"positions": range(30, 33)}, "positions: got range(30, 33), expected within range(0, 32)"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError) as error:
        noise.gumbel_noise(**{"seed": 0, "canvas_index": 0, "step": 0, "canvas_length": 32, "vocab_size": 8, **change})
    assert str(error.value) == message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU to compare with the CPU")
def test_gpu_equals_cpu():
    names = {"seed": (1 << 64) - 3, "canvas_index": 1, "canvas_length": 256}
    step = {"step": 2, "vocab_size": 32_003}
    on_gpu = noise.initial_canvas(**names, vocab_size=262_144, device="cuda").cpu()
    assert torch.equal(on_gpu, noise.initial_canvas(**names, vocab_size=262_144))
    assert torch.equal(noise.renoise_tokens(**names, **step, device="cuda").cpu(), noise.renoise_tokens(**names, **step))
    on_gpu = noise.gumbel_noise(**names, **step, device="cuda").cpu()
    torch.testing.assert_close(on_gpu, noise.gumbel_noise(**names, **step), **GUMBEL_TOLERANCE)
