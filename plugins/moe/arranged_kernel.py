"""The grouped products of experts whose weights are arranged (`plugins.moe.arranging`), as the kernels of each format share
them.

`plugins.moe.kernel` has the shape legend; `plugins.moe.packed_kernel` and `plugins.moe.fp8_kernel`
launch them. The weights are the first factor, which a program loads into registers as it lies in memory, and unpacks or
converts there (`plugins.moe.numbers_kernel`).
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.moe.numbers_kernel import (
    int4_numbers,
    items_of,
    narrow_numbers,
    nvfp4_numbers,
    packed_numbers,
    wide_numbers,
)
from plugins.moe.product_kernel import gelu_tanh


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
    TILE_DEPTH: tl.constexpr,
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
    block = tl.program_id(0) * BLOCKS
    rows = hidden + (routed // TOP_K)[:, None].to(tl.int64) * DEPTH
    weights = gate_up_proj + expert.to(tl.int64) * (NUM_BLOCKS * STRIDE)
    activated += routed[:, None].to(tl.int64) * WIDTH
    of_rows = 1.0 if row_scale is None else tl.load(row_scale + routed // TOP_K, mask=taken, other=0.0)
    weight_scale = None if weight_scale is None else weight_scale + expert.to(tl.int64) * (2 * WIDTH)
    if hidden.dtype.element_ty == tl.float8e4nv:
        first, second = narrow_products(
            rows, taken, weights, block, NUM_BLOCKS, DEPTH, TILE_ROWS, TILE_DEPTH, BLOCKS, BLOCK, STRIDE
        )
        _store_activated(first, activated, taken, block, weight_scale, of_rows, factor, WIDTH, TILE_ROWS, 1, BLOCK)
        if BLOCKS == 2:
            _store_activated(second, activated, taken, block + 1, weight_scale, of_rows, factor, WIDTH, TILE_ROWS, 1, BLOCK)
    else:
        tl.static_assert(TILE_DEPTH == BLOCK)
        product = wide_product(rows, taken, weights, block, NUM_BLOCKS, DEPTH, TILE_ROWS, BLOCKS, BLOCK, STRIDE)
        _store_activated(product, activated, taken, block, weight_scale, of_rows, factor, WIDTH, TILE_ROWS, BLOCKS, BLOCK)


@triton.jit
def _store_activated(
    product,
    activated,
    taken,
    block,
    weight_scale,
    of_rows,
    factor,
    WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """activated: pointers to the tile's rows [TILE_ROWS, 1]. block: the first one of the product."""
    pairs = tl.permute(tl.reshape(product, (BLOCKS * 4, 2, 8, TILE_ROWS)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    gate = tl.reshape(gate, (BLOCKS * BLOCK // 2, TILE_ROWS))
    up = tl.reshape(up, (BLOCKS * BLOCK // 2, TILE_ROWS))
    columns = block * (BLOCK // 2) + tl.arange(0, BLOCKS * BLOCK // 2)
    if weight_scale is not None:
        gate = gate * tl.load(weight_scale + columns, mask=columns < WIDTH, other=0.0)[:, None] * of_rows[None, :]
        up = up * tl.load(weight_scale + WIDTH + columns, mask=columns < WIDTH, other=0.0)[:, None] * of_rows[None, :]
    result = (gelu_tanh(gate) * up * factor).T
    stored = taken[:, None] & (columns < WIDTH)[None, :]
    tl.store(activated + columns[None, :], result.to(activated.dtype.element_ty), mask=stored)


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
    TILE_DEPTH: tl.constexpr,
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
    block = tl.program_id(0) * BLOCKS
    rows = activated + routed[:, None].to(tl.int64) * DEPTH
    weights = down_proj + expert.to(tl.int64) * (NUM_BLOCKS * STRIDE)
    weighted += routed[:, None].to(tl.int64) * WIDTH
    of_rows = tl.load(top_k_weights + routed, mask=taken, other=0.0).to(tl.float32)
    scale_of_rows = 1.0 if row_scale is None else tl.load(row_scale + routed, mask=taken, other=0.0)
    weight_scale = None if weight_scale is None else weight_scale + expert.to(tl.int64) * WIDTH
    if activated.dtype.element_ty == tl.float8e4nv:
        first, second = narrow_products(
            rows, taken, weights, block, NUM_BLOCKS, DEPTH, TILE_ROWS, TILE_DEPTH, BLOCKS, BLOCK, STRIDE
        )
        _store_weighted(first, weighted, taken, block, weight_scale, scale_of_rows, of_rows, WIDTH, 1, BLOCK)
        if BLOCKS == 2:
            _store_weighted(second, weighted, taken, block + 1, weight_scale, scale_of_rows, of_rows, WIDTH, 1, BLOCK)
    else:
        tl.static_assert(TILE_DEPTH == BLOCK)
        product = wide_product(rows, taken, weights, block, NUM_BLOCKS, DEPTH, TILE_ROWS, BLOCKS, BLOCK, STRIDE)
        _store_weighted(product, weighted, taken, block, weight_scale, scale_of_rows, of_rows, WIDTH, BLOCKS, BLOCK)


@triton.jit
def _store_weighted(
    product,
    weighted,
    taken,
    block,
    weight_scale,
    scale_of_rows,
    of_rows,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weighted: pointers to the tile's rows [TILE_ROWS, 1]. block: the first one of the product."""
    columns = block * BLOCK + tl.arange(0, BLOCKS * BLOCK)
    if weight_scale is not None:
        of_columns = tl.load(weight_scale + columns, mask=columns < WIDTH, other=0.0)
        product = product * of_columns[:, None] * scale_of_rows[None, :]
    result = product.T * of_rows[:, None]
    stored = taken[:, None] & (columns < WIDTH)[None, :]
    tl.store(weighted + columns[None, :], result.to(weighted.dtype.element_ty), mask=stored)


@triton.jit
def wide_product(
    rows,
    taken,
    weights,
    first_block,
    NUM_BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """[BLOCKS * 64, TILE_ROWS] float32: the weight's rows from block `first_block` on, times the tile's rows.

    rows: pointers to the tile's rows [TILE_ROWS, 1], wider than FP8. weights: pointer to the expert's first block; int32 are
    packed numbers, int16 whole numbers of 4 bits, uint8 NVFP4 numbers. All three come with their scales, of which the first and
    the last have one for each row at a block's end."""
    PACKED: tl.constexpr = weights.dtype.element_ty == tl.int32
    INT4: tl.constexpr = weights.dtype.element_ty == tl.int16
    NVFP4: tl.constexpr = weights.dtype.element_ty == tl.uint8
    ITEMS: tl.constexpr = items_of(weights.dtype.element_ty, BLOCK)
    blocks = first_block + tl.arange(0, BLOCKS)
    blocks = blocks if NUM_BLOCKS % BLOCKS == 0 else tl.minimum(blocks, NUM_BLOCKS - 1)
    weights_at = weights + blocks[:, None].to(tl.int64) * STRIDE
    depth = tl.arange(0, BLOCK)
    product = tl.zeros((BLOCKS * BLOCK, TILE_ROWS), dtype=tl.float32)
    for step in range((DEPTH + BLOCK - 1) // BLOCK):
        at = step * BLOCK + depth
        if DEPTH % BLOCK == 0:
            x = tl.load(rows + at[None, :], mask=taken[:, None], other=0.0)
        else:
            x = tl.load(rows + at[None, :], mask=taken[:, None] & (at < DEPTH)[None, :], other=0.0)
        if PACKED:
            weight = packed_numbers(weights_at + step * ITEMS, BLOCKS, BLOCK)
        elif INT4:
            weight = int4_numbers(weights_at + step * ITEMS, BLOCKS, BLOCK)
        elif NVFP4:
            weight = nvfp4_numbers(weights_at + step * ITEMS, BLOCKS, BLOCK)
        else:
            weight = wide_numbers(weights_at + step * ITEMS, BLOCKS, BLOCK)
        if weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        product = waited_for(tl.dot(weight, x.T, product, input_precision="ieee"))
    if PACKED or NVFP4:
        ROW_ITEMS: tl.constexpr = 4 if NVFP4 else 1
        row = tl.arange(0, BLOCKS * BLOCK)
        row_block = first_block + row // BLOCK
        row_block = row_block if NUM_BLOCKS % BLOCKS == 0 else tl.minimum(row_block, NUM_BLOCKS - 1)
        scale_at = weights + row_block.to(tl.int64) * STRIDE + (STRIDE - ROW_ITEMS * BLOCK) + row % BLOCK * ROW_ITEMS
        product *= tl.load(scale_at.to(tl.pointer_type(tl.float32), bitcast=True))[:, None]
    return product


@triton.jit
def waited_for(product):
    """`product`, once it is there: what reads a product, even without an instruction, waits for it.

    ptxas before CUDA 13.3 gives the registers of a product's first factor to others before they have been read, if the
    product is under way when a loop goes round (triton-lang/triton, issue 9433 and pull request 11781).
    """
    return tl.inline_asm_elementwise("", "=f,0", [product], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def narrow_products(
    rows,
    taken,
    weights,
    block,
    NUM_BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Two [64, TILE_ROWS] float32: the rows of a block of FP8 weights, and, if BLOCKS is 2, of the next one, times the tile's
    FP8 rows.

    Tensor cores sum products of FP8 numbers with fewer bits than float32 has: only those of TILE_DEPTH columns. So there are
    two sums, and of two blocks not all fit the registers, but those of one after the other.
    """
    tl.static_assert(BLOCKS <= 2)
    STEP: tl.constexpr = TILE_DEPTH * BLOCK  # of a block's numbers
    first_at = weights + block.to(tl.int64) * STRIDE
    second_at = weights + tl.minimum(block + 1, NUM_BLOCKS - 1).to(tl.int64) * STRIDE
    depth = tl.arange(0, TILE_DEPTH)
    first = tl.zeros((BLOCK, TILE_ROWS), dtype=tl.float32)
    second = tl.zeros((BLOCK, TILE_ROWS), dtype=tl.float32)
    for step in range((DEPTH + TILE_DEPTH - 1) // TILE_DEPTH):
        at = step * TILE_DEPTH + depth
        if DEPTH % TILE_DEPTH == 0:
            x = tl.load(rows + at[None, :], mask=taken[:, None], other=0.0)
        else:
            x = tl.load(rows + at[None, :], mask=taken[:, None] & (at < DEPTH)[None, :], other=0.0)
        first += tl.dot(narrow_numbers(first_at, step * STEP, TILE_DEPTH, BLOCK, STRIDE), x.T)
        if BLOCKS == 2:
            second += tl.dot(narrow_numbers(second_at, step * STEP, TILE_DEPTH, BLOCK, STRIDE), x.T)
    return first, second
