"""Triton-language kernels of the experts whose weights are packed (`plugins.moe.packing`): the two grouped products.

See `plugins.moe.kernel` for the shape legend and the other stages, which are the same.

| kernel | inputs | scalars | outputs | a program computes |
|---|---|---|---|---|
| gate_up_packed | hidden [N, D], gate_up_proj [E, blocks, ints], row_order, tile_expert | num_routed | activated [N * k, F] | a tile, BLOCKS blocks |
| down_packed | activated [N * k, F], down_proj [E, blocks, ints], top_k_weights, row_order, tile_expert | num_routed | weighted [N * k, D] | a tile, BLOCKS blocks |

hidden and activated are `ROW_FACTOR` times the rows. The products are those of `plugins.moe.kernel` with the weights first, to the
bit where packing has rounded none of them.
"""  # noqa: E501

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.moe.arranged_kernel import down_arranged, gate_up_arranged
from plugins.moe.packing import ROW_FACTOR

_ROW_FACTOR = tl.constexpr(ROW_FACTOR)


@triton.jit(do_not_specialize=("num_routed",))
def gate_up_packed_kernel(
    hidden,
    gate_up_proj,
    row_order,
    tile_expert,
    num_routed,
    activated,
    NUM_EXPERTS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Grid: (NUM_BLOCKS / BLOCKS, tiles). DEPTH: D. WIDTH: F."""
    gate_up_arranged(
        hidden,
        gate_up_proj,
        row_order,
        tile_expert,
        num_routed,
        activated,
        None,
        None,
        _ROW_FACTOR,
        NUM_EXPERTS,
        NUM_BLOCKS,
        DEPTH,
        WIDTH,
        TOP_K,
        TILE_ROWS,
        TILE_DEPTH,
        BLOCKS,
        BLOCK,
        STRIDE,
    )


@triton.jit(do_not_specialize=("num_routed",))
def down_packed_kernel(
    activated,
    down_proj,
    top_k_weights,
    row_order,
    tile_expert,
    num_routed,
    weighted,
    NUM_EXPERTS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Grid: (NUM_BLOCKS / BLOCKS, tiles). DEPTH: F. WIDTH: D."""
    down_arranged(
        activated,
        down_proj,
        top_k_weights,
        row_order,
        tile_expert,
        num_routed,
        weighted,
        None,
        None,
        NUM_EXPERTS,
        NUM_BLOCKS,
        DEPTH,
        WIDTH,
        TILE_ROWS,
        TILE_DEPTH,
        BLOCKS,
        BLOCK,
        STRIDE,
    )
