"""Weights in 4 bits: whole numbers of -8 to 7, 32 of a row with a scale in bfloat16 that they share.

A weight stands for the products of its numbers and scales. A scale has 5 bits of significand, so that these are bfloat16
numbers, exactly, and the experts' products are those of bfloat16 with them: nothing else has to know that weights have 4 bits.
With its scale a number takes 4.5.

`to_int4` chooses a group's scale among a few, the one whose numbers are nearest to the weights: what a group loses follows from
its largest number, which one scale makes -8, another 7, and others cut off for the sake of the rest. Rounding is to the
nearest, halves to the even number. The error, relative to the norm, is 8.2 % of normal weights, where FP8 has 2.65 %; 9.7 % if
the largest always became 7, and 9.7 % with the same choice in groups of 128.

All this is exact for scales of 2^-126 to 2^122 in magnitude. Smaller ones lose bits and become 0; with larger ones results are
infinite or not numbers, as they are where a group has such.

A weight [E, R, C] in this format is [E, blocks, halfwords] int16, in blocks of 64 rows (`plugins.moe.arranging`): of each 64
columns 512 words, one for 8 numbers, then 128 scales. With rows and columns named as there, words are in the order

    warp, lane_row, lane_column, upper, far; and scales: warp, lane_row, upper, far.

Two numbers of a word are unpacked at once, neighbours in a row: turned to the right by 4 (2 next + right) bits, the word has
them, 8 larger than they are, at bits 3 to 6 and 19 to 22. There they are part of bfloat16 numbers of 16 to 31, of which one
multiplication, with an addition of -24 scales, makes number * scale.
"""

import itertools

import torch
from torch import Tensor

from plugins.moe.arranging import BLOCK, from_blocks, in_blocks, num_blocks, num_depths

GROUP = 32
"""Numbers of a row that share a scale."""

WORDS, SCALES = BLOCK * BLOCK // 8, BLOCK * BLOCK // GROUP
HALFWORDS = 2 * WORDS + SCALES
"""Of 64 x 64 numbers."""

INT4_DTYPE = "int16"

_LEAST, _MOST = -8, 7
_LAST_WORD_BITS = (1 << 29) - 1
_LARGEST_BECOMES = (-8.0, 7.0, 7.3, 7.6, -8.3, -8.6, -9.0)
"""What a group's largest number may be in units of the scale; of equally good ones the first is taken."""


def is_int4(weight: Tensor) -> bool:
    return weight.dtype == getattr(torch, INT4_DTYPE)


def int4_shape(shape: tuple[int, int, int], halves: int) -> tuple[int, int, int]:
    """[E, blocks, halfwords] of a weight [E, R, C]; see `to_int4`."""
    num_experts, rows, columns = shape
    return num_experts, num_blocks(rows, halves), num_depths(columns) * HALFWORDS


def to_int4(weight: Tensor, halves: int = 1) -> Tensor:
    """Rounds [E, R, C] bfloat16. halves: see `plugins.moe.arranging`."""
    numbers, scale = rounded_groups(in_blocks(weight, halves).unflatten(-1, (-1, GROUP)))
    *outer, _, columns = numbers.flatten(-2).shape
    split = (numbers + -_LEAST).view(*outer, 4, 2, 8, columns // BLOCK, 2, 2, 2, 4, 2)
    #                             -9 warp, upper, lane_row, depth block, far, next, right, lane_column, odd
    split = split.permute(*range(len(outer)), *(split.ndim + axis for axis in (-6, -9, -7, -2, -8, -5, -4, -3, -1)))
    split = split.reshape(*outer, columns // BLOCK, WORDS, 8)
    words = torch.zeros(split.shape[:-1], dtype=torch.int32, device=split.device)
    for (next_, right, odd), number in zip(itertools.product(range(2), repeat=3), split.unbind(-1), strict=True):
        number, at = number.int(), 3 + 4 * (2 * next_ + right) + 16 * odd
        words |= number << at if at < 31 else number >> 1 | number << 31  # one goes round
    scales = scale.view(*outer, 4, 2, 8, columns // BLOCK, 2)
    scales = scales.permute(*range(len(outer)), *(scales.ndim + axis for axis in (-2, -5, -3, -4, -1)))
    return torch.cat([words.view(torch.int16), scales.flatten(-4).view(torch.int16)], dim=-1).flatten(-2)


def rounded_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Of bfloat16 numbers [..., group], the whole numbers, int8, and the groups' scales [...] bfloat16."""
    exact = groups.float()
    largest = exact.gather(-1, exact.abs().argmax(-1, keepdim=True))
    least = scale = None
    for becomes in _LARGEST_BECOMES:
        tried = _in_5_bits(largest / becomes).float()
        error = _rounded(exact, tried).mul_(tried).sub_(exact).square_().sum(-1, keepdim=True)
        scale = tried if scale is None else tried.where(error < least, scale)
        least = error if least is None else error.minimum(least)
    return _rounded(exact, scale).to(torch.int8), scale.bfloat16().squeeze(-1)


def _rounded(exact: Tensor, scale: Tensor) -> Tensor:
    """Whole numbers in float32, as groups with their scales have them; 0 where the scale is 0."""
    return (exact / scale.where(scale != 0, torch.inf)).round_().clamp_(_LEAST, _MOST)


def _in_5_bits(values: Tensor) -> Tensor:
    """bfloat16 numbers with 5 bits of significand, next to `values`; what is not finite stays as it is."""
    rounded = values.bfloat16()
    return (rounded.view(torch.int16) + 4 & ~7).view(torch.bfloat16).where(rounded.isfinite(), rounded)


def from_int4(weight: Tensor, rows: int, columns: int, halves: int = 1) -> Tensor:
    """The numbers that a weight stands for, [E, R, C] bfloat16, with the `rows` and `columns` of what was rounded."""
    *outer, _ = weight.shape
    parts = weight.view(*outer, -1, HALFWORDS)
    depths = parts.shape[-2]
    words = parts[..., : 2 * WORDS].contiguous().view(torch.int32).view(*outer, depths, 4, 8, 4, 2, 2)
    turned = (words >> 3 & _LAST_WORD_BITS) | words << 29  # no number goes round
    numbers = torch.stack([(turned >> at & 0xF).to(torch.int8) for at in range(0, 32, 4)], dim=-1)
    numbers = numbers.add_(_LEAST).view(*words.shape, 2, 2, 2)  # odd, next, right
    #           -9 depth block, warp, lane_row, lane_column, upper, far, odd, next, right
    order = (-8, -5, -7, -9, -4, -2, -1, -6, -3)
    numbers = numbers.permute(*range(len(outer)), *(numbers.ndim + axis for axis in order))
    scales = parts[..., 2 * WORDS :].contiguous().view(torch.bfloat16).view(*outer, depths, 4, 8, 2, 2)
    scales = scales.permute(*range(len(outer)), *(scales.ndim + axis for axis in (-4, -2, -3, -5, -1)))
    groups = numbers.reshape(*outer, BLOCK, -1, GROUP) * scales.reshape(*outer, BLOCK, -1, 1)
    return from_blocks(groups.flatten(-2), rows, columns, halves)
