"""Weights in 4 bits: how they are rounded, and where their numbers and scales are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.moe.arranging import BLOCK
from plugins.moe.int4 import GROUP, HALFWORDS, WORDS, from_int4, int4_shape, is_int4, rounded_groups, to_int4

SHAPES = [((2, 128, 192), 1), ((3, 64, 96), 2), ((1, 1408, 704), 2), ((2, 30, 70), 2), ((1, 1, 1), 1)]


def error(rounded: torch.Tensor, weight: torch.Tensor) -> float:
    return ((rounded.double() - weight.double()).norm() / weight.double().norm()).item()


@pytest.mark.parametrize(("shape", "halves"), SHAPES)
def test_a_weight_stands_for_its_rounded_groups(shape, halves):
    weight = (torch.randn(shape) * 0.02).bfloat16()
    stored = to_int4(weight, halves)
    assert is_int4(stored) and not is_int4(weight)
    assert tuple(stored.shape) == int4_shape(shape, halves) and stored.is_contiguous()
    filled = torch.nn.functional.pad(weight, (0, -shape[2] % GROUP))
    numbers, scale = rounded_groups(filled.unflatten(-1, (-1, GROUP)))
    expected = (numbers.double() * scale.double().unsqueeze(-1)).flatten(-2)[..., : shape[2]]
    actual = from_int4(stored, *shape[1:], halves)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual.double(), expected)  # no product of a number and its scale is rounded


def test_the_real_shapes():
    assert int4_shape((128, 1408, 2816), 2) == (128, 22, 44 * HALFWORDS)
    assert int4_shape((128, 2816, 704), 1) == (128, 44, 11 * HALFWORDS)
    assert HALFWORDS * 16 == BLOCK * BLOCK * 4.5  # bits


def test_numbers_are_the_nearest_and_the_scale_the_best_of_those_tried():
    weight = torch.randn(500, GROUP).bfloat16()
    numbers, scale = rounded_groups(weight)
    assert numbers.min() == -8 and numbers.max() == 7
    bits = scale.view(torch.int16)
    assert not (bits & 7).any()  # 5 bits of significand
    ratio = weight.double() / scale.double().unsqueeze(-1)
    assert torch.equal(numbers.double(), ratio.round().clamp(-8, 7))

    def errors(of: torch.Tensor) -> torch.Tensor:
        whole = (weight.double() / of.double().unsqueeze(-1)).round().clamp(-8, 7)
        return (whole * of.double().unsqueeze(-1) - weight.double()).square().sum(-1)

    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True)).squeeze(-1)
    own = errors(scale)
    for becomes in (-8.0, -8.6, 7.0, 7.6):
        tried = (((largest / becomes).view(torch.int16) + 4) & ~7).view(torch.bfloat16)
        assert (own <= errors(tried) * (1 + 1e-6)).all()


def test_what_normal_weights_lose():
    """Less than with scales that make the largest number 7, and than in longer groups."""
    weight = torch.randn(256, 2816).bfloat16()
    rounded = from_int4(to_int4(weight[None]), *weight.shape)[0]
    assert 0.081 < error(rounded, weight) < 0.083

    def plainly(group: int) -> float:
        groups = weight.double().unflatten(-1, (-1, group))
        scale = groups.abs().amax(-1, keepdim=True) / 7
        return error(((groups / scale).round() * scale).flatten(-2), weight)

    assert 0.096 < plainly(GROUP) < 0.098
    assert plainly(128) > 0.11


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(1 << 15), (1 << 15) - 1), min_size=GROUP, max_size=GROUP))
def test_any_group(numbers):
    """Of any bits that are a number whose group's scale is neither too small nor too large for bfloat16, and of zeros."""
    weight = torch.tensor(numbers, dtype=torch.int16).view(torch.bfloat16).float()
    weight = torch.where(weight.abs() < 2.0**120, weight, 1.0)
    weight = torch.where(weight.abs().amax() > 2.0**-110, weight, 0.0).bfloat16()
    whole, scale = rounded_groups(weight)
    rounded = whole.double() * scale.double()
    assert rounded.isfinite().all()
    # What is cut off is at most 1 of the 8.6 that the largest may be; the rest is within half a scale.
    assert ((rounded - weight.double()).abs() <= 1.2 * scale.double().abs()).all()
    assert torch.equal(from_int4(to_int4(weight.view(1, 1, GROUP)), 1, GROUP).double().flatten(), rounded)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(bad):
    """A damaged checkpoint must not become a plausible one."""
    weight = torch.randn(1, BLOCK, 128).bfloat16()
    weight[0, 5, 40] = bad
    rounded = from_int4(to_int4(weight), BLOCK, 128)
    assert not rounded[0, 5, 40].isfinite()
    assert rounded[0, :5].isfinite().all() and rounded[0, 5, 64:].isfinite().all()


def test_numbers_and_scales_are_at_the_places_of_their_registers():
    """By the definition: each number of a block alone, the scale of its group beside it."""
    torch.manual_seed(0)
    for _ in range(64):
        warp, upper, lane_row, lane_column, far, next_, right, odd = (
            torch.randint(size, ()).item() for size in (4, 2, 8, 4, 2, 2, 2, 2)
        )
        row, column = 16 * warp + 8 * upper + lane_row, 32 * far + 16 * next_ + 8 * right + 2 * lane_column + odd
        weight = torch.zeros(1, BLOCK, BLOCK).bfloat16()
        weight[0, row, column] = -1.5
        stored = to_int4(weight)[0, 0]
        words = stored[: 2 * WORDS].view(torch.int32).long() & 0xFFFFFFFF
        place = 128 * warp + 16 * lane_row + 4 * lane_column + 2 * upper + far
        turned = (words[place] | words[place] << 32).item() >> 4 * (2 * next_ + right)
        number = (turned >> 3 + 16 * odd & 15) - 8
        scales = stored[2 * WORDS :].view(torch.bfloat16)
        scale = scales[32 * warp + 4 * lane_row + 2 * upper + far]
        assert scales.nonzero().numel() == 1
        assert number * scale == -1.5
        assert words.sum() - words[place] == (WORDS - 1) * 0x44444444  # all others are 0, which is stored as 8
