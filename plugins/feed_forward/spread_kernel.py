"""The Triton-language kernel that fetches from another GPU what the experts of this one need.

| kernel | inputs | scalars | outputs | a program computes |
|---|---|---|---|---|
| fetch | numbers [N, W], others [N, V] | less | the same two, of the numbers each one less `less` | one row |
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("less",))
def fetch_kernel(
    numbers,
    others,
    less,
    numbers_here,
    others_here,
    WIDTH: tl.constexpr,
    OTHER_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHER_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column, other = tl.arange(0, BLOCK), tl.arange(0, OTHER_BLOCK)
    at, is_one = row * WIDTH + column, column < WIDTH
    tl.store(numbers_here + at, tl.load(numbers + at, mask=is_one) - less, mask=is_one)
    at, is_one = row * OTHER_WIDTH + other, other < OTHER_WIDTH
    tl.store(others_here + at, tl.load(others + at, mask=is_one), mask=is_one)
