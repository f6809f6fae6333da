"""Kernels of the MLP: its two products in the tiles of the experts' ones, and the part between the products of a library.

| kernel | inputs | scalars | outputs | a program computes |
|---|---|---|---|---|
| mlp_gate_up | rows [N, D], gate_up_proj [2 F, D] | num_rows | activated [N, F] | a tile, TILE_WIDTH columns |
| mlp_down | activated [N, F], down_proj [D, F] | num_rows | output [N, D] | a tile, TILE_WIDTH columns |
| activate | gate_up [N, 2 F] | num_rows | activated [N, F] | ROWS rows, BLOCK columns |

The tiles leave most of a multiprocessor's memory to others, so that the products run beside those of the experts; a library's
kernel waits for a whole multiprocessor.
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.moe.product_kernel import down_tile, gate_up_tile, gelu_tanh, rounded


@triton.jit(do_not_specialize=("num_rows",))
def mlp_gate_up_kernel(
    rows,
    gate_up_proj,
    num_rows,
    activated,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
):
    """activated = gelu_tanh(gate(rows)) * up(rows), as an expert that every row goes to. Rounded as by `activate_kernel`: rows
    get the same from both."""
    gate_up_tile(
        rows,
        gate_up_proj,
        None,
        None,
        num_rows,
        activated,
        1,
        HIDDEN,
        WIDTH,
        1,
        TILE_ROWS,
        TILE_WIDTH,
        TILE_DEPTH,
        WEIGHTS_FIRST,
        True,
    )


@triton.jit(do_not_specialize=("num_rows",))
def mlp_down_kernel(
    activated,
    down_proj,
    num_rows,
    output,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
):
    """output = down(activated)."""
    down_tile(
        activated,
        down_proj,
        None,
        None,
        None,
        num_rows,
        output,
        1,
        HIDDEN,
        WIDTH,
        TILE_ROWS,
        TILE_WIDTH,
        TILE_DEPTH,
        WEIGHTS_FIRST,
    )


@triton.jit(do_not_specialize=("num_rows",))
def activate_kernel(gate_up, num_rows, activated, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (F / BLOCK, N / ROWS). Rounds gelu_tanh(gate) before it is multiplied, as the definition does."""
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (rows < num_rows) & (columns < WIDTH)
    dtype = activated.dtype.element_ty
    at = gate_up + rows * (2 * WIDTH) + columns
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    tl.store(activated + rows * WIDTH + columns, (rounded(gelu_tanh(gate), dtype) * up).to(dtype), mask=inside)
