"""Triton-language kernels of the experts whose weights have 4 bits (`plugins.moe.int4`): the two grouped products.

See `plugins.moe.kernel` for the shape legend and the other stages, which are the same.

| kernel | inputs | scalars | outputs | a program computes |
|---|---|---|---|---|
| gate_up_int4 | hidden [N, D], gate_up_proj [E, blocks, halfwords], row_order, tile_expert | num_routed | activated [N * k, F] | a tile, BLOCKS blocks |
| down_int4 | activated [N * k, F], down_proj [E, blocks, halfwords], top_k_weights, row_order, tile_expert | num_routed | weighted [N * k, D] | a tile, BLOCKS blocks |

The products are those of `plugins.moe.kernel` with the bfloat16 numbers that the weights stand for, weights first.
"""  # noqa: E501

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.moe.arranged_kernel import down_arranged, gate_up_arranged


@triton.jit(do_not_specialize=("num_routed",))
def gate_up_int4_kernel(
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
        1.0,
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
def down_int4_kernel(
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
