"""The kernel of the heads operator: what a compiler makes of its definition are five kernels, each for a part of the heads.

Arguments and shape legend: the package's. Rounds where the definition rounds.
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl


@triton.jit
def heads_kernel(
    heads,
    q_norm,
    k_norm,
    cos,
    sin,
    query,
    new_kv,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid: (T, (H + 2 K) / HEADS). A program: HEADS heads of one token, all queries, all keys or all values."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    HALF: tl.constexpr = HEAD_DIM // 2
    lanes = tl.arange(0, HALF)
    places = tl.arange(0, HEADS)[:, None] * HEAD_DIM + lanes[None, :]
    dtype = query.dtype.element_ty

    read_heads: tl.constexpr = NUM_HEADS + NUM_KV_HEADS * (2 if HAS_VALUES else 1)
    read_head = head if HAS_VALUES else tl.where(is_value, head - NUM_KV_HEADS, head)
    read_at = heads + (token * read_heads + read_head) * HEAD_DIM + places
    first, second = tl.load(read_at).to(tl.float32), tl.load(read_at + HALF).to(tl.float32)
    squares = tl.sum(first * first + second * second, axis=1)
    factor = tl.rsqrt(squares / HEAD_DIM + EPS)[:, None]
    first, second = first * factor, second * factor

    if is_value:
        written = new_kv + (token * (2 * NUM_KV_HEADS) + head - NUM_HEADS) * HEAD_DIM + places
        tl.store(written, first.to(dtype))
        tl.store(written + HALF, second.to(dtype))
    else:
        is_query = head < NUM_HEADS
        first *= tl.where(is_query, tl.load(q_norm + lanes), tl.load(k_norm + lanes)).to(tl.float32)[None, :]
        second *= tl.where(is_query, tl.load(q_norm + HALF + lanes), tl.load(k_norm + HALF + lanes)).to(tl.float32)[None, :]
        first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        angle = token * HEAD_DIM + lanes
        turned_first = _turned(first, cos + angle, second * -1.0, sin + angle, dtype)
        turned_second = _turned(second, cos + HALF + angle, first, sin + HALF + angle, dtype)
        if is_query:
            written = query + (token * NUM_HEADS + head) * HEAD_DIM + places
            tl.store(written, turned_first)
            tl.store(written + HALF, turned_second)
        else:
            written = new_kv + (token * (2 * NUM_KV_HEADS) + head - NUM_HEADS) * HEAD_DIM + places
            tl.store(written, turned_first)
            tl.store(written + HALF, turned_second)


@triton.jit
def _turned(x, cos_at, other, sin_at, dtype: tl.constexpr):
    """x * cos + other * sin, each product rounded."""
    by_cos = (x * tl.load(cos_at).to(tl.float32)[None, :]).to(dtype).to(tl.float32)
    by_sin = (other * tl.load(sin_at).to(tl.float32)[None, :]).to(dtype).to(tl.float32)
    return (by_cos + by_sin).to(dtype)
