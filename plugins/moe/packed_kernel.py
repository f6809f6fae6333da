"""Triton-language kernels of the experts whose weights are bfloat16 numbers in fewer bits, 12 (`plugins.moe.packing`) or 4
(`plugins.moe.int4`, `plugins.moe.nvfp4`): the two grouped products.

See `plugins.moe.kernel` for the shape legend and the other stages, which are the same.

| kernel | inputs | scalars | outputs | a program computes |
|---|---|---|---|---|
| gate_up_packed | hidden [N, D], gate_up_proj [E, blocks, items], row_order, tile_expert | num_routed | activated [N * k, F] | a tile, BLOCKS blocks |
| down_packed | activated [N * k, F], down_proj [E, blocks, items], top_k_weights, row_order, tile_expert | num_routed | weighted [N * k, D] | a tile, BLOCKS blocks |

hidden and activated are FACTOR times the rows: `ROW_FACTOR` for packed weights, 1 for those in 4 bits. The products are those of
`plugins.moe.kernel` with the weights first, to the bit with the numbers that the weights stand for.
"""  # noqa: E501

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.moe.arranged_kernel import down_arranged, gate_up_arranged


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
    FACTOR: tl.constexpr,
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
        FACTOR,
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
