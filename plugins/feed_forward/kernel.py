"""The feed-forward operator's norms, one kernel before the products and one after: a row a program, in registers throughout.

| kernel | inputs | outputs |
|---|---|---|
| enter | hidden, attended [N, D], three norms and the router's scale [D] | residual, dense_rows, expert_rows, router_rows [N, D], row_scale [N] |
| leave | residual, dense [N, D], weighted [N * k, D], scalar [1] or [N], four norms [D] | output, normed [N, D] |

weighted is what the experts make of each routed row (see `plugins.moe.kernel`); leave sums it over a row's experts, in their
order. expert_rows are as the products of the experts read them (`plugins.moe.kinds`): times a power of two, and for FP8 weights with
a scale for each row, which elsewhere is 1. Both kernels round where the definition rounds.
"""  # noqa: E501

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.moe.fp8_kernel import divided, scale_of
from plugins.moe.product_kernel import rounded


@triton.jit
def enter_kernel(
    hidden,
    attended,
    post_attention_norm,
    dense_norm,
    experts_norm,
    router_scale,
    residual,
    dense_rows,
    expert_rows,
    row_scale,
    router_rows,
    COLUMNS: tl.constexpr,
    EPS: tl.constexpr,
    SCALED: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (N,). SCALED: expert_rows are scaled. FACTOR: they are times it. BLOCK: COLUMNS rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    at = row * COLUMNS + columns
    dtype = residual.dtype.element_ty

    rows = tl.load(attended + at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    added = rounded(rows * inverse_rms(rows, COLUMNS, EPS) * weight(post_attention_norm, columns, inside), dtype)
    rows = rounded(before + added, dtype)
    tl.store(residual + at, rows.to(dtype), mask=inside)

    rows *= inverse_rms(rows, COLUMNS, EPS)
    tl.store(dense_rows + at, (rows * weight(dense_norm, columns, inside)).to(dtype), mask=inside)
    for_router = rounded(rounded(rows, dtype) * weight(router_scale, columns, inside), dtype) * (COLUMNS**-0.5)
    tl.store(router_rows + at, for_router.to(dtype), mask=inside)
    for_experts = rounded(rows * weight(experts_norm, columns, inside), dtype) * FACTOR
    scale = 1.0
    if SCALED:
        scale = scale_of(tl.max(tl.abs(for_experts), axis=0), expert_rows.dtype.element_ty)
        for_experts = divided(for_experts, scale)
    tl.store(expert_rows + at, for_experts.to(expert_rows.dtype.element_ty), mask=inside)
    tl.store(row_scale + row, scale)


@triton.jit
def leave_kernel(
    residual,
    dense,
    weighted,
    scalar,
    dense_norm,
    experts_norm,
    mixed_norm,
    next_norm,
    output,
    normed,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    EPS: tl.constexpr,
    SCALAR_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (N,). SCALAR_STRIDE: 0 where all rows have one scalar, else 1. BLOCK: COLUMNS rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    at = row * COLUMNS + columns
    dtype = output.dtype.element_ty

    sparse = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in tl.static_range(TOP_K):
        sparse += tl.load(weighted + (row * TOP_K + place) * COLUMNS + columns, mask=inside, other=0.0).to(tl.float32)
    sparse = rounded(sparse, dtype)
    rows = tl.load(dense + at, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)

    rows = rounded(rows * inverse_rms(rows, COLUMNS, EPS) * weight(dense_norm, columns, inside), dtype)
    sparse = rounded(sparse * inverse_rms(sparse, COLUMNS, EPS) * weight(experts_norm, columns, inside), dtype)
    rows = rounded(rows + sparse, dtype)
    rows = rounded(rows * inverse_rms(rows, COLUMNS, EPS) * weight(mixed_norm, columns, inside), dtype)
    rows = rounded(rounded(before + rows, dtype) * tl.load(scalar + row * SCALAR_STRIDE).to(tl.float32), dtype)
    tl.store(output + at, rows.to(dtype), mask=inside)
    rows = rows * inverse_rms(rows, COLUMNS, EPS) * weight(next_norm, columns, inside)
    tl.store(normed + at, rows.to(dtype), mask=inside)


@triton.jit
def inverse_rms(rows, COLUMNS: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of a row whose lanes beyond COLUMNS are 0."""
    return tl.rsqrt(tl.sum(rows * rows, axis=0) / COLUMNS + EPS)


@triton.jit
def weight(weights, columns, inside):
    """A norm's weights in float32."""
    return tl.load(weights + columns, mask=inside, other=0.0).to(tl.float32)
