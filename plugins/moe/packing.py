"""Packed weights: bfloat16 numbers in 12 bits.

A bfloat16 number has 8 bits of exponent, and a row of a weight uses few of them: nearly all of its numbers lie within 15
powers of two below its largest. A packed number is a sign, 4 bits of exponent and the 7 bits of mantissa, with a base for each
row, and underflows gradually, as floating-point numbers do. So, with 2^t the power of two of a row's largest number,

    a number of at least 2^(t - 14) is kept to the bit,
    a smaller one is rounded to a multiple of 2^(t - 21), by 2^(t - 22) at most.

Of normal weights 1 in 9,000 is changed. Relative to its norm that changes the product of a row of 2,816 numbers by 6e-9, where
the roundings of its float32 sum are 1.2e-7, and that of the result to bfloat16 1.7e-3.

A packed weight is [E, blocks, ints] int32, in blocks of 64 rows (`plugins.moe.arranging`): of each 64 columns three planes of
512 words, then the rows' scale, 64 float32 numbers.

64 x 64 numbers are 512 groups of 8, each in one word of every plane. A number's bits are at the places that they have in a
bfloat16 number of exponent 0 to 15, in one half of a word or in what is left over in three words: two numbers are unpacked at
once by one AND, or by four shifts and ORs. With rows and columns named as in `plugins.moe.arranging`, groups are in the order

    warp, lane_row, lane_column, upper, far; and the numbers of a group: next, right, odd.

An unpacked number is 2^base times too small. Rows are multiplied by 2^64 (`ROW_FACTOR`) before the product, and sums by the
row's scale, 2^(base - 64), after it: powers of two, on which no bit of a sum depends, as long as rows are below 2^63 and
weights below 2^80. Beyond, results are infinite or not numbers.
"""

import torch
from torch import Tensor

from plugins.moe.arranging import BLOCK, from_blocks, in_blocks, num_blocks, num_depths

GROUPS = BLOCK * BLOCK // 8
PLANES = 3
_ROW_POWER = 64
ROW_FACTOR = 2.0**_ROW_POWER
PACKED_DTYPE = "int32"

SIGNS, WHOLE = (word - (1 << 32) for word in (0x80008000, 0x87FF87FF))
"""Of two numbers in a word, as int32 has them: the signs; the bits of a number that is whole there."""

_EXPONENTS = 15  # besides 0
_MANTISSA_BITS = 7


def is_packed(weight: Tensor) -> bool:
    return weight.dtype == getattr(torch, PACKED_DTYPE)


def packed_shape(shape: tuple[int, int, int], halves: int) -> tuple[int, int, int]:
    """[E, blocks, ints] of a weight [E, R, C]; see `pack`."""
    num_experts, rows, columns = shape
    return num_experts, num_blocks(rows, halves), num_depths(columns) * PLANES * GROUPS + BLOCK


def pack(weight: Tensor, halves: int = 1) -> Tensor:
    """Packs [E, R, C] bfloat16. halves: see `plugins.moe.arranging`."""
    bits = in_blocks(weight.view(torch.int16), halves).int()
    exponent = bits >> _MANTISSA_BITS & 0xFF
    base = (exponent.amax(-1, keepdim=True) - _EXPONENTS).clamp(min=0)
    significand = torch.where(exponent > 0, bits & 0x7F | 0x80, bits & 0x7F)
    exponent = exponent.clamp(min=1) - base
    # Below 1 it is rounded to where its last bit has the value of that of exponent 1: to the nearest, halves to the even one.
    shift = (1 - exponent).clamp(0, 9)
    rounded = significand + (1 << shift >> 1) - (shift > 0).int() + (significand >> shift & (shift > 0))
    number = (exponent.clamp(min=1) - 1 << _MANTISSA_BITS) + (rounded >> shift) | bits & 0x8000
    scale = torch.exp2(base.squeeze(3).float() - _ROW_POWER)
    return torch.cat([_words(number).flatten(2), scale.view(torch.int32)], dim=2)


def unpack(packed: Tensor, rows: int, columns: int, halves: int = 1) -> Tensor:
    """The numbers of a packed weight, [E, R, C] bfloat16: with `rows` and `columns` of what was packed, its rounded numbers."""
    num_experts, blocks = packed.shape[:2]
    words = packed[..., :-BLOCK].reshape(num_experts, blocks, -1, PLANES, GROUPS)
    scale = packed[..., -BLOCK:].contiguous().view(torch.float32).double() * ROW_FACTOR
    bits = _numbers(words)
    small = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(torch.bfloat16)
    return from_blocks((small.double() * scale.unsqueeze(3)).bfloat16(), rows, columns, halves)


def _words(number: Tensor) -> Tensor:
    """[..., 64, C] 16 bits each in int32 → [..., C / 64, planes, groups] int32."""
    *outer, _, columns = number.shape
    split = number.view(*outer, 4, 2, 8, columns // BLOCK, 2, 2, 2, 4, 2)
    #                  -9 warp, upper, lane_row, depth block, far, next, right, lane_column, odd
    order = (-6, -9, -7, -2, -8, -5, -4, -3, -1)
    split = split.permute(*range(len(outer)), *(split.ndim + axis for axis in order))
    split = split.reshape(*outer, columns // BLOCK, GROUPS, 4, 2)
    even, odd = split.unbind(-1)
    first, second, third, fourth = (even & 0xFFFF | odd << 16).unbind(-1)
    first = first | (fourth & 0x07800780) << 4
    second = second | (fourth & 0x00780078) << 8
    third = third | (fourth & 0x00070007) << 12 | fourth >> 4 & 0x08000800
    return torch.stack([first, second, third], dim=-2)


def _numbers(words: Tensor) -> Tensor:
    """The inverse of `_words`."""
    *outer, depth_blocks, _, _ = words.shape
    first, second, third = words.unbind(-2)
    fourth = first >> 4 & 0x07800780 | second >> 8 & 0x00780078 | third >> 12 & 0x00070007 | third << 4 & SIGNS
    pair = torch.stack([*(word & WHOLE for word in (first, second, third)), fourth], dim=-1)
    split = torch.stack([pair & 0xFFFF, pair >> 16 & 0xFFFF], dim=-1)
    split = split.view(*outer, depth_blocks, 4, 8, 4, 2, 2, 2, 2, 2)
    #                             -9 depth block, warp, lane_row, lane_column, upper, far, next, right, odd
    order = (-8, -5, -7, -9, -4, -3, -2, -6, -1)
    split = split.permute(*range(len(outer)), *(split.ndim + axis for axis in order))
    return split.reshape(*outer, BLOCK, depth_blocks * BLOCK)
