"""The grouped products of experts whose weights are arranged (`plugins.moe.arranging`), as the kernels of each format share
them.

`plugins.moe.kernel` has the shape legend; `plugins.moe.packed_kernel` and `plugins.moe.fp8_kernel` launch them. The weights
are the first factor, which a program loads into registers as it lies in memory, and unpacks or converts there.
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.moe.packing import SIGNS, WHOLE
from plugins.moe.product_kernel import gelu_tanh

_SIGNS, _WHOLE = tl.constexpr(SIGNS), tl.constexpr(WHOLE)


@triton.jit
def gate_up_arranged(
    hidden,
    gate_up_proj,
    row_order,
    tile_expert,
    num_routed,
    activated,
    weight_scale,
    row_scale,
    factor,
    NUM_EXPERTS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """One program of a gate_up kernel; a block is 32 gate rows and 32 up rows. weight_scale [E, 2 F] and row_scale [N] are
    None, or what the products are times, and factor what the result is.

    Columns are the grid's fast axis, as in `plugins.moe.product_kernel`.
    """
    slots = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    expert = tl.load(tile_expert + tl.program_id(1))
    routed = tl.load(row_order + slots)
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    taken = (routed >= 0) & (routed < num_routed)
    first_block = tl.program_id(0) * BLOCKS
    rows = hidden + (routed // TOP_K)[:, None].to(tl.int64) * DEPTH
    weights = gate_up_proj + expert.to(tl.int64) * (NUM_BLOCKS * STRIDE)
    product = arranged_product(
        rows, taken, weights, first_block, num_routed, NUM_BLOCKS, DEPTH, TILE_ROWS, BLOCKS, BLOCK, STRIDE
    )
    pairs = tl.permute(tl.reshape(product, (BLOCKS * 4, 2, 8, TILE_ROWS)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    gate = tl.reshape(gate, (BLOCKS * BLOCK // 2, TILE_ROWS))
    up = tl.reshape(up, (BLOCKS * BLOCK // 2, TILE_ROWS))
    columns = first_block * (BLOCK // 2) + tl.arange(0, BLOCKS * BLOCK // 2)
    if weight_scale is not None:
        scale_at = weight_scale + expert.to(tl.int64) * (2 * WIDTH) + columns
        of_rows = tl.load(row_scale + routed // TOP_K, mask=taken, other=0.0)[None, :]
        gate = gate * tl.load(scale_at, mask=columns < WIDTH, other=0.0)[:, None] * of_rows
        up = up * tl.load(scale_at + WIDTH, mask=columns < WIDTH, other=0.0)[:, None] * of_rows
    result = (gelu_tanh(gate) * up * factor).T
    stored = taken[:, None] & (columns < WIDTH)[None, :]
    activated_at = activated + routed[:, None].to(tl.int64) * WIDTH + columns[None, :]
    tl.store(activated_at, result.to(activated.dtype.element_ty), mask=stored)


@triton.jit
def down_arranged(
    activated,
    down_proj,
    top_k_weights,
    row_order,
    tile_expert,
    num_routed,
    weighted,
    weight_scale,
    row_scale,
    NUM_EXPERTS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """One program of a down kernel. weight_scale [E, D] and row_scale [N * k] are None, or what the product is times."""
    slots = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    expert = tl.load(tile_expert + tl.program_id(1))
    routed = tl.load(row_order + slots)
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    taken = (routed >= 0) & (routed < num_routed)
    first_block = tl.program_id(0) * BLOCKS
    rows = activated + routed[:, None].to(tl.int64) * DEPTH
    weights = down_proj + expert.to(tl.int64) * (NUM_BLOCKS * STRIDE)
    product = arranged_product(
        rows, taken, weights, first_block, num_routed, NUM_BLOCKS, DEPTH, TILE_ROWS, BLOCKS, BLOCK, STRIDE
    )
    columns = first_block * BLOCK + tl.arange(0, BLOCKS * BLOCK)
    if weight_scale is not None:
        of_columns = tl.load(weight_scale + expert.to(tl.int64) * WIDTH + columns, mask=columns < WIDTH, other=0.0)
        product = product * of_columns[:, None] * tl.load(row_scale + routed, mask=taken, other=0.0)[None, :]
    result = product.T * tl.load(top_k_weights + routed, mask=taken, other=0.0).to(tl.float32)[:, None]
    stored = taken[:, None] & (columns < WIDTH)[None, :]
    weighted_at = weighted + routed[:, None].to(tl.int64) * WIDTH + columns[None, :]
    tl.store(weighted_at, result.to(weighted.dtype.element_ty), mask=stored)


@triton.jit
def arranged_product(
    rows,
    taken,
    weights,
    first_block,
    num_routed,
    NUM_BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """[BLOCKS * 64, TILE_ROWS] float32: the weight's rows from block `first_block` on, times the tile's rows.

    rows: pointers to the tile's rows [TILE_ROWS, 1]. weights: pointer to the expert's first block; int32 are packed numbers,
    which come with their scale."""
    PACKED: tl.constexpr = weights.dtype.element_ty == tl.int32
    ITEMS: tl.constexpr = BLOCK * BLOCK * 3 // 8 if PACKED else BLOCK * BLOCK  # of 64 x 64 numbers
    blocks = first_block + tl.arange(0, BLOCKS)
    blocks = blocks if NUM_BLOCKS % BLOCKS == 0 else tl.minimum(blocks, NUM_BLOCKS - 1)
    weights_at = weights + blocks[:, None].to(tl.int64) * STRIDE
    depth = tl.arange(0, BLOCK)
    product = tl.zeros((BLOCKS * BLOCK, TILE_ROWS), dtype=tl.float32)
    # 1, which the compiler does not know. Because the total is multiplied by it, or added to, each step waits for its product:
    # ptxas before CUDA 13.3 gives the registers of a product's first factor to others before they have been read, if the
    # product is under way when the loop goes round (triton-lang/triton, issue 9433 and pull request 11781).
    one = tl.minimum(num_routed, 1).to(tl.float32)
    for step in range((DEPTH + BLOCK - 1) // BLOCK):
        at = step * BLOCK + depth
        if DEPTH % BLOCK == 0:
            x = tl.load(rows + at[None, :], mask=taken[:, None], other=0.0)
        else:
            x = tl.load(rows + at[None, :], mask=taken[:, None] & (at < DEPTH)[None, :], other=0.0)
        if PACKED:
            weight = packed_numbers(weights_at + step * ITEMS, BLOCKS, BLOCK)
        else:
            weight = fp8_numbers(weights_at + step * ITEMS, BLOCKS, BLOCK, x.dtype == tl.float8e4nv)
        if weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        if x.dtype == tl.float8e4nv:
            # Products of FP8 numbers are summed with fewer bits than float32 has: only those of one step.
            product += tl.dot(weight, x.T)
        else:
            product = tl.dot(weight, x.T, product * one, input_precision="ieee")
    if PACKED:
        row = tl.arange(0, BLOCKS * BLOCK)
        row_block = first_block + row // BLOCK
        row_block = row_block if NUM_BLOCKS % BLOCKS == 0 else tl.minimum(row_block, NUM_BLOCKS - 1)
        scale = tl.load(weights + row_block.to(tl.int64) * STRIDE + (STRIDE - BLOCK) + row % BLOCK)
        product *= scale.to(tl.float32, bitcast=True)[:, None]
    return product


@triton.jit
def packed_numbers(at, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """at: pointers [BLOCKS, 1] to the words of 64 x 64 packed numbers. Returns [BLOCKS * 64, 64] bfloat16, 2^base times too
    small."""
    GROUPS: tl.constexpr = BLOCK * BLOCK // 8
    at += tl.arange(0, GROUPS)[None, :]
    first, second, third = tl.load(at), tl.load(at + GROUPS), tl.load(at + 2 * GROUPS)
    fourth = ((first >> 4) & 0x07800780) | ((second >> 8) & 0x00780078) | ((third >> 12) & 0x00070007) | ((third << 4) & _SIGNS)
    left = tl.join(first & _WHOLE, second & _WHOLE)
    pair = tl.join(left, tl.join(third & _WHOLE, fourth))  # [BLOCKS, GROUPS, right, next]
    even = (pair & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    odd = (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    number = tl.reshape(tl.join(even, odd), (BLOCKS, 4, 8, 4, 2, 2, 2, 2, 2))
    # block, warp, lane_row, lane_column, upper, far, right, next, odd
    number = tl.permute(number, (0, 1, 4, 2, 5, 7, 6, 3, 8))
    return tl.reshape(number, (BLOCKS * BLOCK, BLOCK))


@triton.jit
def fp8_numbers(at, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr):
    """at: pointers [BLOCKS, 1] to 64 x 64 numbers. Returns [BLOCKS * 64, 64] as they are. NARROW: see
    `plugins.moe.arranging`."""
    number = tl.load(at + tl.arange(0, BLOCK * BLOCK)[None, :])
    if NARROW:  # block, upper, warp, lane_row, lane_column, far, right, byte
        number = tl.reshape(number, (BLOCKS, 2, 4, 8, 4, 2, 2, 4))
        number = tl.permute(number, (0, 2, 1, 3, 5, 6, 4, 7))
    else:  # block, upper, warp, lane_row, lane_column, far, next, right, odd
        number = tl.reshape(number, (BLOCKS, 2, 4, 8, 4, 2, 2, 2, 2))
        number = tl.permute(number, (0, 2, 1, 3, 5, 6, 7, 4, 8))
    return tl.reshape(number, (BLOCKS * BLOCK, BLOCK))
