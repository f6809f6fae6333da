"""What the second products for Hopper do alike: bring a tile's rows into shared memory, and its results out of it.

A program has two groups of four warps, each with blocks of the weight of its own: `hopper_down_kernel.py` for packed weights,
`hopper_down_fp8_kernel.py` for FP8 ones. These are in Gluon, which says what happens when; neither Triton's interpreter nor
other GPUs can run them.
"""

# ruff: noqa: N803 - constants are in capitals

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

GROUPS, GROUP_WARPS = gl.constexpr(2), gl.constexpr(4)

REGISTERS = gl.constexpr(232)
"""Of a thread of the second group; the first gets the rest."""


@gluon.jit
def routed_rows(slots, num_routed, TILE_ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """slots: of the tile, in the order of experts. Returns two [TILE_ROWS]: the routed rows, and whether a slot has one."""
    routed = gl.load(slots + gl.arange(0, TILE_ROWS, LAYOUT))
    return routed, (routed >= 0) & (routed < num_routed)


@gluon.jit
def copy_rows(room, rows, routed, taken, start: gl.constexpr, DEPTH: gl.constexpr, COPIED: gl.constexpr):
    """Columns of the tile's rows from `start` on into `room` [TILE_ROWS, columns], zeros beyond DEPTH and without a row."""
    columns = gl.arange(0, room.shape[1], gl.SliceLayout(0, COPIED))
    pointers = rows + gl.where(taken, routed, 0)[:, None].to(gl.int64) * DEPTH + columns[None, :]
    inside = taken[:, None] & (start + columns < DEPTH)[None, :]
    async_copy.async_copy_global_to_shared(room, pointers + start, mask=inside)


@gluon.jit
def store_of_rows(room, values, routed, taken):
    """A number of each row of the tile into `room` [TILE_ROWS], 0 where there is no row."""
    room.store(gl.load(values + routed, mask=taken, other=0.0).to(gl.float32))


@gluon.jit
def store_weighted(product, room, weighted, line, block, STORED: gl.constexpr):
    """product [BLOCK, TILE_ROWS]. line: of each row its first block of the output, negative where there is no row.

    Through `room` [TILE_ROWS, BLOCK], so that whole lines are written."""
    room.permute((1, 0)).store(product.to(room.dtype))
    result = room.load(STORED)
    columns = gl.arange(0, room.shape[1], gl.SliceLayout(0, STORED))
    at = weighted + (line + block)[:, None].to(gl.int64) * room.shape[1]
    gl.store(at + columns[None, :], result, mask=(line >= 0)[:, None])
