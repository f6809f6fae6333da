"""Weights of experts in the order of the registers in which Hopper's wgmma takes its first factor.

A weight [E, R, C] becomes blocks of 64 rows, [E, blocks, …], and a block's numbers follow each other, 64 columns after 64 columns,
in the order in which the threads of a program that multiplies them have them in registers. So what is read is one stretch of
memory, 16 bytes by each thread, and what a thread has read it multiplies: no number passes another thread, and a format that is
not a tensor core's is unpacked on the way (`plugins.moe.packing`, `plugins.moe.int4`).

Rows and columns are filled up with zeros to whole blocks. With halves 2 a block has 32 rows of the weight's first half and 32 of
its second, in turns of 8, so that the thread which has a gate's row has the up row that belongs to it, too.

The order of 64 x 64 numbers, slowest first, with row = 16 warp + 8 upper + lane_row, and

| numbers | instruction | column | order |
|---|---|---|---|
| 2 bytes in the product | m64k16 | 32 far + 16 next + 8 right + 2 lane_column + odd | upper, warp, lane_row, lane_column, far, next, right, odd |
| 1 byte in the product | m64k32 | 32 far + 16 right + 4 lane_column + byte | upper, warp, lane_row, lane_column, far, right, byte |

(PTX ISA, "Register Fragments for wgmma"). The second order is that of FP8 weights that meet FP8 rows; those of the formats
whose numbers are not whole bytes are in these.
"""  # noqa: E501

import torch
from torch import Tensor

BLOCK = 64

HALVES = {"gate_up_proj": 2, "down_proj": 1}
"""Of each projection of a layer's experts."""

# What a number's row and column are made of: sizes, as they follow in [64, 64] …
_ROW = (4, 2, 8)  # warp, upper, lane_row
_WIDE = (2, 2, 2, 4, 2)  # far, next, right, lane_column, odd
_NARROW = (2, 2, 4, 4)  # far, right, lane_column, byte
# … and their places in that, in the order of the table.
_WIDE_ORDER = (1, 0, 2, 6, 3, 4, 5, 7)
_NARROW_ORDER = (1, 0, 2, 5, 3, 4, 6)


def num_blocks(rows: int, halves: int) -> int:
    """Of a weight with so many rows."""
    return -(-(rows // halves) // (BLOCK // halves))


def num_depths(columns: int) -> int:
    """How many times 64 columns a block has."""
    return -(-columns // BLOCK)


def arranged_shape(shape: tuple[int, int, int], halves: int) -> tuple[int, int, int]:
    """[E, blocks, 64 * columns] of a weight [E, R, C]; see `arrange`."""
    num_experts, rows, columns = shape
    return num_experts, num_blocks(rows, halves), num_depths(columns) * BLOCK * BLOCK


def in_blocks(weight: Tensor, halves: int) -> Tensor:
    """[E, R, C] → [E, blocks, 64, columns], filled up with zeros."""
    num_experts, rows, columns = weight.shape
    blocks = num_blocks(rows, halves)
    missing = (0, num_depths(columns) * BLOCK - columns, 0, (blocks * BLOCK - rows) // halves)
    filled = torch.nn.functional.pad(weight.reshape(num_experts, halves, rows // halves, columns), missing)
    in_turns = filled.view(num_experts, halves, blocks * BLOCK // (8 * halves), 8, -1).transpose(1, 2)
    return in_turns.reshape(num_experts, blocks, BLOCK, -1)


def from_blocks(blocks: Tensor, rows: int, columns: int, halves: int) -> Tensor:
    """The inverse of `in_blocks`, [E, R, C]."""
    num_experts, count, *_ = blocks.shape
    in_turns = blocks.reshape(num_experts, count * BLOCK // (8 * halves), halves, 8, -1).transpose(1, 2)
    filled = in_turns.reshape(num_experts, halves, count * BLOCK // halves, -1)
    return filled[:, :, : rows // halves, :columns].reshape(num_experts, rows, columns).contiguous()


def arrange(weight: Tensor, halves: int, *, narrow: bool) -> Tensor:
    """[E, R, C] e4m3 → [E, blocks, 64 * columns] e4m3. narrow: for products of FP8 numbers, else of wider ones."""
    blocks = in_blocks(weight.view(torch.uint8), halves)
    *outer, _, columns = blocks.shape
    sizes, order = (_NARROW, _NARROW_ORDER) if narrow else (_WIDE, _WIDE_ORDER)
    tiles = blocks.view(*outer, BLOCK, columns // BLOCK, BLOCK).transpose(2, 3)
    split = tiles.reshape(*outer, columns // BLOCK, *_ROW, *sizes).permute(0, 1, 2, *(3 + place for place in order))
    return split.reshape(*outer, BLOCK * columns).view(weight.dtype)
