"""Triton-language kernels of the experts whose weights are FP8 (e4m3): rows made ready, and the two grouped products.

See `plugins.moe.kernel` for the shape legend and the other stages, which are the same. R rows of C columns are hidden [N, D] or
activated [N * k, F].

| kernel | inputs | scalars | outputs | a program computes |
|---|---|---|---|---|
| scale_rows | rows [R, C] | R | scaled_rows [R, C], row_scale [R] | ROWS rows |
| gate_up_fp8 | hidden as scaled_rows, row_scale [N], gate_up_proj, weight_scale [E, 2 F], row_order, tile_expert | num_routed | activated [N * k, F] | a tile, BLOCKS blocks |
| down_fp8 | activated as scaled_rows, row_scale [N * k], down_proj, weight_scale [E, D], top_k_weights, row_order, tile_expert | num_routed | weighted [N * k, D] | a tile, BLOCKS blocks |

gate_up_proj and down_proj are arranged (`plugins.moe.arranging`), [E, blocks, 64 * columns]; their scales are not.

A weight is its FP8 number times the scale of its output channel, a row's element its number in scaled_rows times the row's scale;
products of the numbers are summed in float32, and the sum is multiplied by both scales at the end.

Rows that are not to lose precision are multiplied in float16, whose scale is a power of two: Hopper turns e4m3 into float16 with
one instruction for two numbers, into bfloat16 with four, two of them at a quarter of the rate, which reading the weights would
wait for. Of bfloat16 rows nothing is lost but what is 2^-32 of the row's largest element or less.
"""  # noqa: E501

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.moe.arranged_kernel import down_arranged, gate_up_arranged


@triton.jit(do_not_specialize=("num_rows",))
def scale_rows_kernel(rows, num_rows, scaled_rows, row_scale, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """scaled_rows * row_scale = rows, with `scale_of` each row's largest element; e4m3 elements are rounded to the nearest.

    Grid: (R / ROWS,).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (columns < COLUMNS)[None, :]
    at = row.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    values = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(values), axis=1), scaled_rows.dtype.element_ty)
    scaled = divided(values, scale[:, None])
    tl.store(scaled_rows + at, scaled.to(scaled_rows.dtype.element_ty), mask=inside)
    tl.store(row_scale + row, scale, mask=row < num_rows)


@triton.jit
def scale_of(largest, dtype: tl.constexpr):
    """The scale of a row: its largest element becomes 448 in e4m3, and 2^14 to 2^15 in other dtypes, a power of two.

    A row of zeros, whose largest element counts as 2^-100, gets a scale that is a normal number, too.
    """
    largest = tl.maximum(largest, 2.0**-100)
    if dtype == tl.float8e4nv:
        scale = tl.div_rn(largest, 448.0)
    else:
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = power * 2.0**-14
    return scale


@triton.jit
def divided(values, scale):
    """values / scale, rounded to the nearest, in three instructions a number, where a division by itself has a dozen, and a
    branch for numbers that are very large, very small or 0.

    A product with the inverse, corrected by what it leaves over (Markstein, "Computation of elementary functions on the IBM
    RISC System/6000 processor", 1990).
    """
    inverse = tl.div_rn(1.0, scale)
    quotient = values * inverse
    return tl.fma(tl.fma(-quotient, scale, values), inverse, quotient)


@triton.jit(do_not_specialize=("num_routed",))
def gate_up_fp8_kernel(
    hidden,
    row_scale,
    gate_up_proj,
    weight_scale,
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
        weight_scale,
        row_scale,
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
def down_fp8_kernel(
    activated,
    row_scale,
    down_proj,
    weight_scale,
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
        weight_scale,
        row_scale,
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
