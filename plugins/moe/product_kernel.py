"""The grouped products of the mixture of experts on weights of the rows' dtype, as a checkpoint has them.

`plugins.moe.kernel` has the shape legend and launches them, `plugins.feed_forward.mlp_kernel` for an MLP; the products of
weights in an order and a format of their own are in `plugins.moe.arranged_kernel`.
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl


@triton.jit
def gate_up_tile(
    hidden,
    gate_up_proj,
    row_order,
    tile_expert,
    num_routed,
    activated,
    NUM_EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """One program of `gate_up_kernel`. Without row_order and tile_expert there is one expert, to which all rows go.

    ROUNDED: to the dtype of `activated` after every operation, as a model that is written in PyTorch does.

    Columns are the grid's fast axis: the programs that run together read one stretch of weights, and share the rows of a tile.
    WEIGHTS_FIRST: the product is computed transposed, where a tile has fewer rows than the tensor cores' tallest instruction.
    """
    tile = tl.program_id(1)
    slots = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    if row_order is None:
        expert = tile * 0
        routed = slots
    else:
        expert = tl.load(tile_expert + tile)
        routed = tl.load(row_order + slots)
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    taken = (routed >= 0) & (routed < num_routed)  # about half of the slots at few rows; the others must not cost reads
    columns = tl.program_id(0) * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
    read_columns = columns if WIDTH % TILE_WIDTH == 0 else tl.minimum(columns, WIDTH - 1)
    depth = tl.arange(0, TILE_DEPTH)
    rows_at = hidden + (routed // TOP_K)[:, None].to(tl.int64) * HIDDEN + depth[None, :]
    gate_at = gate_up_proj + expert.to(tl.int64) * (2 * WIDTH * HIDDEN) + read_columns[:, None] * HIDDEN + depth[None, :]
    up_at = gate_at + WIDTH * HIDDEN
    gate = tl.zeros((TILE_WIDTH, TILE_ROWS) if WEIGHTS_FIRST else (TILE_ROWS, TILE_WIDTH), dtype=tl.float32)
    up = tl.zeros((TILE_WIDTH, TILE_ROWS) if WEIGHTS_FIRST else (TILE_ROWS, TILE_WIDTH), dtype=tl.float32)
    for start in range(0, HIDDEN, TILE_DEPTH):
        if HIDDEN % TILE_DEPTH == 0:
            x = tl.load(rows_at + start, mask=taken[:, None], other=0.0)
            gate_weight, up_weight = tl.load(gate_at + start), tl.load(up_at + start)
        else:
            inside = start + depth < HIDDEN
            x = tl.load(rows_at + start, mask=taken[:, None] & inside[None, :], other=0.0)
            gate_weight = tl.load(gate_at + start, mask=inside[None, :], other=0.0)
            up_weight = tl.load(up_at + start, mask=inside[None, :], other=0.0)
        gate = add_product(gate, gate_weight, x, WEIGHTS_FIRST)
        up = add_product(up, up_weight, x, WEIGHTS_FIRST)
    dtype = activated.dtype.element_ty
    if ROUNDED:
        gate, up = rounded(gate, dtype), rounded(up, dtype)
    gate = gelu_tanh(gate)
    if ROUNDED:
        gate = rounded(gate, dtype)
    result = gate * up
    if WEIGHTS_FIRST:
        result = result.T
    stored = taken[:, None] & (columns < WIDTH)[None, :]
    activated_at = activated + routed[:, None].to(tl.int64) * WIDTH + columns[None, :]
    tl.store(activated_at, result.to(dtype), mask=stored)


@triton.jit
def down_tile(
    activated,
    down_proj,
    top_k_weights,
    row_order,
    tile_expert,
    num_routed,
    weighted,
    NUM_EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_DEPTH: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
):
    """One program of `down_kernel`; top_k_weights [N * k] is None, or what the product is times. Without row_order and
    tile_expert there is one expert, to which all rows go."""
    tile = tl.program_id(1)
    slots = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    if row_order is None:
        expert = tile * 0
        routed = slots
    else:
        expert = tl.load(tile_expert + tile)
        routed = tl.load(row_order + slots)
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    taken = (routed >= 0) & (routed < num_routed)
    columns = tl.program_id(0) * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
    read_columns = columns if HIDDEN % TILE_WIDTH == 0 else tl.minimum(columns, HIDDEN - 1)
    depth = tl.arange(0, TILE_DEPTH)
    rows_at = activated + routed[:, None].to(tl.int64) * WIDTH + depth[None, :]
    down_at = down_proj + expert.to(tl.int64) * (HIDDEN * WIDTH) + read_columns[:, None] * WIDTH + depth[None, :]
    result = tl.zeros((TILE_WIDTH, TILE_ROWS) if WEIGHTS_FIRST else (TILE_ROWS, TILE_WIDTH), dtype=tl.float32)
    for start in range(0, WIDTH, TILE_DEPTH):
        if WIDTH % TILE_DEPTH == 0:
            x = tl.load(rows_at + start, mask=taken[:, None], other=0.0)
            weight = tl.load(down_at + start)
        else:
            inside = start + depth < WIDTH
            x = tl.load(rows_at + start, mask=taken[:, None] & inside[None, :], other=0.0)
            weight = tl.load(down_at + start, mask=inside[None, :], other=0.0)
        result = add_product(result, weight, x, WEIGHTS_FIRST)
    if WEIGHTS_FIRST:
        result = result.T
    if top_k_weights is not None:
        result *= tl.load(top_k_weights + routed, mask=taken, other=0.0).to(tl.float32)[:, None]
    stored = taken[:, None] & (columns < HIDDEN)[None, :]
    weighted_at = weighted + routed[:, None].to(tl.int64) * HIDDEN + columns[None, :]
    tl.store(weighted_at, result.to(weighted.dtype.element_ty), mask=stored)


@triton.jit
def gelu_tanh(x):
    """x / 2 * (1 + tanh(u)) = x * sigmoid(2 u), with u = sqrt(2 / pi) * (x + 0.044715 x^3)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """float32 numbers as `dtype` holds them."""
    return values.to(dtype).to(tl.float32)


@triton.jit
def add_product(total, weight, x, WEIGHTS_FIRST: tl.constexpr):
    """total + x weight^T, or its transpose: x [TILE_ROWS, TILE_DEPTH], weight [TILE_WIDTH, TILE_DEPTH]."""
    if WEIGHTS_FIRST:
        total = tl.dot(weight, x.T, total, input_precision="ieee")
    else:
        total = tl.dot(x, weight.T, total, input_precision="ieee")
    return total
