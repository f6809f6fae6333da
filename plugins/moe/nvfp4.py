"""Weights in NVFP4: numbers of 4 bits (e2m1), 16 of a row with a scale in FP8 (e4m3), and a float32 factor for a whole weight.

A weight stands for the products number * scale * factor. Number * scale has at most 6 bits of significand, so that it is a
bfloat16 number, exactly; the factor is applied to a product's float32 sum. With its scale a number takes 4.5 bits.

A checkpoint that `python -m builder quantize` wrote has a weight [E, R, C] row by row, [E, R, bytes] uint8: two numbers a byte,
the first in its lower half; a scale for each 16; the float32 factor of the weight that the row is from. That of a gate and of
its up may differ. C is a multiple of 16.

For the kernels it becomes [E, blocks, bytes] uint8, in blocks of 64 rows (`plugins.moe.arranging`): of each 64 columns 512
words, one for 8 numbers, then 256 scales; then a float32 number for each row. With rows and columns named as there,
they are in the order

    words: warp, lane_row, lane_column, upper, far; scales: warp, lane_row, upper, far, next; rows: as they are.

Two numbers of a word are unpacked at once, neighbours in a row: the even one is in the word's lower half. A number's four bits
come to where a bfloat16 number has its sign and the last two bits of exponent and the first of mantissa, which makes it
2^126 times too small, also where it is 0.5, whose exponent is 0 in both. In both halves of a word they are at

    next 0, right 0: 15, 8, 7, 6; next 0, right 1: 12, 5, 4, 3; next 1, right 0: 9, 2, 1, 0; next 1, right 1: 14, 13, 11, 10.

A scale becomes 5 bits of exponent and 3 of mantissa, without a sign, so that none is subnormal: as the middle bits of a
bfloat16 number whose exponent begins with 111 they are 2^119 times the scale. A row's number is 2^7 times the factor. A
negative scale gives its sign to its numbers; where a scale is 0 the numbers become so.
"""

import itertools

import torch
from torch import Tensor

from plugins.moe.arranging import BLOCK, from_blocks, in_blocks, num_blocks, num_depths

GROUP = 16
"""Numbers of a row that share a scale."""

WORDS, SCALES = BLOCK * BLOCK // 8, BLOCK * BLOCK // GROUP
BYTES = 4 * WORDS + SCALES
"""Of 64 x 64 numbers."""

FACTOR_BYTES = 4

NVFP4_DTYPE = "uint8"
"""Of a tensor with such numbers."""

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the three lower bits of a number; the fourth is the sign."""

_PLACES = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 13, 11, 10))
"""In each half of a word, of the four numbers, next and right: where their bits are, the sign first."""

_SIGNS = 0x88
"""Of two numbers in a byte."""

_SCALE_BITS = (127 - 22) << 3
"""What the exponent and the first three bits of mantissa of a float32 number are larger by than the scale's eight bits."""

_SCALE_OF_1 = 22 << 3
_NOT_A_NUMBER = 0xFF
_ROW_FACTOR = 2.0**7


def is_nvfp4(weight: Tensor) -> bool:
    return weight.dtype == getattr(torch, NVFP4_DTYPE)


def row_bytes(columns: int) -> int:
    """Of a row as a checkpoint has it."""
    return columns // 2 + columns // GROUP + FACTOR_BYTES


def num_columns(num_bytes: int) -> int:
    """The inverse of `row_bytes`."""
    return (num_bytes - FACTOR_BYTES) * 2 * GROUP // (GROUP + 2)


def rows_of(numbers: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
    """[R, bytes] uint8 of numbers [R, C / 2] uint8, scales [R, C / 16] e4m3 and one factor."""
    factors = factor.float().reshape(1, 1).expand(len(numbers), 1).contiguous().view(torch.uint8)
    return torch.cat([numbers, scales.contiguous().view(torch.uint8), factors], dim=-1)


def numbers_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What rows [..., bytes] stand for: numbers times scales [..., C] float32, and the factors [...]."""
    pairs, scales, factors = _parts(rows)
    codes = torch.stack([pairs & 0xF, pairs >> 4], dim=-1).flatten(-2)
    numbers = _values(codes).unflatten(-1, (-1, GROUP)) * scales.unsqueeze(-1)
    return numbers.flatten(-2), factors


def all_finite(rows: Tensor) -> bool:
    """Whether all that rows stand for is."""
    _, scales, factors = _parts(rows)
    return bool(scales.isfinite().all() and (factors * (_VALUES[-1] * torch.finfo(torch.float8_e4m3fn).max)).isfinite().all())


def nvfp4_shape(shape: tuple[int, int, int], halves: int) -> tuple[int, int, int]:
    """[E, blocks, bytes] of a weight of [E, R, C] numbers; see `to_nvfp4`."""
    num_experts, rows, columns = shape
    return num_experts, num_blocks(rows, halves), num_depths(columns) * BYTES + FACTOR_BYTES * BLOCK


def to_nvfp4(rows: Tensor, halves: int = 1) -> Tensor:
    """Brings [E, R, bytes] into the order of the kernels. halves: see `plugins.moe.arranging`."""
    pairs, scales, factors = _parts(rows)
    depths = num_depths(2 * pairs.shape[-1])
    groups, of_group = pairs.unflatten(-1, (-1, GROUP // 2)), scales.unsqueeze(-1)
    groups = (groups ^ torch.where(of_group < 0, _SIGNS, 0).to(torch.uint8)).where(of_group != 0, 0)
    bits = (scales.abs().view(torch.int32) >> 20) - _SCALE_BITS
    bits = bits.where(scales != 0, _SCALE_OF_1).where(scales.isfinite(), _NOT_A_NUMBER).to(torch.uint8)

    pairs = in_blocks(groups.flatten(-2), halves)[..., : depths * BLOCK // 2]
    *outer, _, _ = pairs.shape
    split = pairs.reshape(*outer, 4, 2, 8, depths, 2, 2, 2, 4)
    #                      -8 warp, upper, lane_row, depth block, far, next, right, lane_column
    split = split.permute(*range(len(outer)), *(split.ndim + axis for axis in (-5, -8, -6, -1, -7, -4, -3, -2)))
    words = torch.zeros(split.shape[:-2], dtype=torch.int32, device=split.device)
    for pair, in_word in zip(split.flatten(-2).unbind(-1), _pairs_in_words(split.device), strict=True):
        words |= in_word.index_select(0, pair.int().flatten()).view(words.shape)
    of_groups = in_blocks(bits, halves)[..., : depths * BLOCK // GROUP].reshape(*outer, 4, 2, 8, depths, 2, 2)
    of_groups = of_groups.permute(*range(len(outer)), *(of_groups.ndim + axis for axis in (-3, -6, -4, -5, -2, -1)))
    parts = [words.view(*outer, depths, WORDS).view(torch.uint8), of_groups.reshape(*outer, depths, SCALES)]
    of_rows = in_blocks(factors.unsqueeze(-1) * _ROW_FACTOR, halves)[..., 0].contiguous()
    return torch.cat([torch.cat(parts, dim=-1).flatten(-2), of_rows.view(torch.uint8)], dim=-1)


def from_nvfp4(weight: Tensor, rows: int, columns: int, halves: int = 1) -> tuple[Tensor, Tensor]:
    """As `numbers_of`, of what `to_nvfp4` made: numbers times scales [E, R, C] bfloat16, and the factors [E, R] float32. Of
    finite scales."""
    *outer, _ = weight.shape
    parts = weight[..., : -FACTOR_BYTES * BLOCK].unflatten(-1, (-1, BYTES))
    depths = parts.shape[-2]
    words = parts[..., : 4 * WORDS].contiguous().view(torch.int32).view(*outer, depths, 4, 8, 4, 2, 2)
    codes = []
    for places, half in itertools.product(_PLACES, (0, 16)):
        code = sum((words >> half + place & 1) << 3 - bit for bit, place in enumerate(places))
        codes.append(code.to(torch.uint8))
    numbers = torch.stack(codes, dim=-1).view(*words.shape, 2, 2, 2)
    #           -9 depth block, warp, lane_row, lane_column, upper, far, next, right, odd
    order = (-8, -5, -7, -9, -4, -3, -2, -6, -1)
    numbers = numbers.permute(*range(len(outer)), *(numbers.ndim + axis for axis in order))
    bits = parts[..., 4 * WORDS :].reshape(*outer, depths, 4, 8, 2, 2, 2).int()
    bits = bits.permute(*range(len(outer)), *(bits.ndim + axis for axis in (-5, -3, -4, -6, -2, -1)))
    scales = (bits + _SCALE_BITS << 20).view(torch.float32).reshape(*outer, BLOCK, -1, 1)
    groups = _values(numbers.reshape(*outer, BLOCK, -1, GROUP)) * scales
    of_rows = weight[..., -FACTOR_BYTES * BLOCK :].contiguous().view(torch.float32).unsqueeze(-1) / _ROW_FACTOR
    return from_blocks(groups.flatten(-2).bfloat16(), rows, columns, halves), from_blocks(of_rows, rows, 1, halves).squeeze(-1)


def _pairs_in_words(device: torch.device) -> Tensor:
    """[4, 256] int32: what a byte with two numbers is in a word, for each place that it may have there."""
    byte = torch.arange(256, dtype=torch.int32, device=device)
    even, odd = (
        torch.stack([sum((number >> 3 - bit & 1) << place for bit, place in enumerate(places)) for places in _PLACES])
        for number in (byte & 0xF, byte >> 4)
    )
    return even | odd << 16


def _parts(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of numbers [..., C / 2] uint8, scales [..., C / 16] float32, factors [...] float32 of rows."""
    columns = num_columns(rows.shape[-1])
    pairs, scales, factors = rows.split([columns // 2, columns // GROUP, FACTOR_BYTES], dim=-1)
    aligned = factors.clone(memory_format=torch.contiguous_format)
    return pairs, scales.contiguous().view(torch.float8_e4m3fn).float(), aligned.view(torch.float32).squeeze(-1)


def _values(codes: Tensor) -> Tensor:
    """Of numbers of 4 bits, in float32."""
    both = torch.tensor([*_VALUES, *(-value for value in _VALUES)], device=codes.device)
    return both[codes.int()]
