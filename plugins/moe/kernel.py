"""Triton-language kernels of the mixture of experts, one a pipeline stage: router_logits, router, align, gate_up, down, combine.

Shape legend: N rows, E experts, k experts a row, D hidden, F expert width. A routed row is one pair of a row and one of its
experts; routed row n * k + j is row n with its j-th expert. A slot is a place in the routed rows' order by expert, where
each expert starts a new tile of TILE_ROWS slots; a slot that holds no routed row holds N * k.

| kernel | inputs | scalars | outputs | a program computes |
|---|---|---|---|---|
| router_logits | rows [N, D], projection [E, D] | num_rows | parts [P, N, E] float32 | a tile, one part or half of them |
| router | logits [N, E] or their parts [P, N, E], per_expert_scale [E] | num_rows | top_k_weights [N, k], top_k_index [N, k] | ROWS rows |
| align | top_k_index [N, k] | num_routed, num_tiles | row_order [slots], tile_expert [tiles] | see `plugins.moe.alignment_kernel` |
| gate_up | hidden [N, D], gate_up_proj [E, 2 F, D], row_order, tile_expert | num_routed | activated [N * k, F] | a tile, TILE_WIDTH columns |
| down | activated, down_proj [E, D, F], top_k_weights, row_order, tile_expert | num_routed | weighted [N * k, D] | a tile, TILE_WIDTH columns |
| combine | weighted [N * k, D] | | output [N, D] | one row, BLOCK columns |

What a TensorRT plugin with embedded PTX can launch shapes the signatures: inputs, then int32 scalars, then outputs, then
constants; scratch is an output and never assumed zeroed. Scalars are not specialised, so that one binary serves every
number of rows there and here. Indices that are out of range are skipped: a TensorRT builder times a plugin on made-up
inputs, and a kernel that faults ends the build. All tensors are contiguous. The kernels compute in float32 and store in the output's dtype.
"""  # noqa: E501

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.moe.product_kernel import down_tile, gate_up_tile, rounded


@triton.jit(do_not_specialize=("num_rows",))
def router_logits_kernel(
    rows,
    projection,
    num_rows,
    parts,
    HIDDEN: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    DEPTH: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    """Grid: (N / ROWS, programs that share a row). Each of these sums NUM_PARTS parts of PART columns, one or the half of all.

    A part is a sum of its own; those of a half are added in their order, then the halves, here or by `router_kernel`. So a
    row's logits are the same bit for bit however many programs share it, which depends on the number of rows.
    """
    own_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, EXPERTS_POW2)
    depth = tl.arange(0, DEPTH)
    rows_at = rows + tl.minimum(own_rows, num_rows - 1)[:, None].to(tl.int64) * HIDDEN + depth[None, :]
    weights_at = projection + tl.minimum(experts, NUM_EXPERTS - 1)[None, :] * HIDDEN + depth[:, None]
    total = tl.zeros((ROWS, EXPERTS_POW2), dtype=tl.float32)
    first = tl.program_id(1) * NUM_PARTS
    for part in range(first, tl.minimum(first + NUM_PARTS, tl.cdiv(HIDDEN, PART))):
        of_part = tl.zeros((ROWS, EXPERTS_POW2), dtype=tl.float32)
        for start in range(part * PART, (part + 1) * PART, DEPTH):
            if HIDDEN % PART == 0:
                x, weight = tl.load(rows_at + start), tl.load(weights_at + start)
            else:
                inside = start + depth < HIDDEN
                x = tl.load(rows_at + start, mask=inside[None, :], other=0.0)
                weight = tl.load(weights_at + start, mask=inside[:, None], other=0.0)
            of_part = tl.dot(x, weight, of_part, input_precision="ieee")
        total += of_part
    stored = (own_rows < num_rows)[:, None] & (experts < NUM_EXPERTS)[None, :]
    at = (tl.program_id(1) * num_rows + own_rows).to(tl.int64)[:, None] * NUM_EXPERTS + experts[None, :]
    tl.store(parts + at, total, mask=stored)


@triton.jit(do_not_specialize=("num_rows",))
def router_kernel(
    logits,
    per_expert_scale,
    num_rows,
    top_k_weights,
    top_k_index,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    TOP_K_POW2: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """Softmax over the experts, the k largest, renormalised, times the experts' scale; equal logits: the lower index first.

    NUM_PARTS: logits are the sums of so many parts, see `router_logits_kernel`; BFLOAT16: rounded to that.

    The softmax's denominator cancels in the renormalisation, so that only the k chosen exponentials are computed.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    experts = tl.arange(0, EXPERTS_POW2)
    places = tl.arange(0, TOP_K_POW2)
    read_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    logits_at = logits + read_rows[:, None] * NUM_EXPERTS + experts[None, :]
    left = tl.load(logits_at, mask=(experts < NUM_EXPERTS)[None, :], other=float("-inf")).to(tl.float32)
    second_half = tl.zeros_like(left)
    for part in tl.static_range(1, NUM_PARTS):
        part_at = logits + (part * num_rows + read_rows)[:, None] * NUM_EXPERTS + experts[None, :]
        of_part = tl.load(part_at, mask=(experts < NUM_EXPERTS)[None, :], other=0.0)
        if part < (NUM_PARTS + 1) // 2:
            left += of_part
        else:
            second_half += of_part
    left += second_half
    if BFLOAT16:
        left = rounded(left, tl.bfloat16)
    largest = tl.max(left, axis=1)
    weights = tl.zeros((ROWS, TOP_K_POW2), dtype=tl.float32)
    index = tl.zeros((ROWS, TOP_K_POW2), dtype=tl.int32)
    for place in tl.static_range(TOP_K):
        best, expert = tl.max(left, axis=1, return_indices=True, return_indices_tie_break_left=True)
        here = places[None, :] == place
        weights = tl.where(here, tl.exp(best - largest)[:, None], weights)
        index = tl.where(here, expert[:, None], index)
        left = tl.where(experts[None, :] == expert[:, None], float("-inf"), left)
    scale = tl.load(per_expert_scale + index).to(tl.float32)
    weights = weights / tl.sum(weights, axis=1)[:, None] * scale
    stored = in_rows[:, None] & (places < TOP_K)[None, :]
    offsets = rows[:, None].to(tl.int64) * TOP_K + places[None, :]
    tl.store(top_k_weights + offsets, weights.to(top_k_weights.dtype.element_ty), mask=stored)
    tl.store(top_k_index + offsets, index.to(top_k_index.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=("num_routed",))
def gate_up_kernel(
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
):
    """activated[routed row] = gelu_tanh(gate(hidden[its row])) * up(hidden[its row]), by its expert's projections."""
    gate_up_tile(
        hidden,
        gate_up_proj,
        row_order,
        tile_expert,
        num_routed,
        activated,
        NUM_EXPERTS,
        HIDDEN,
        WIDTH,
        TOP_K,
        TILE_ROWS,
        TILE_WIDTH,
        TILE_DEPTH,
        WEIGHTS_FIRST,
        False,
    )


@triton.jit(do_not_specialize=("num_routed",))
def down_kernel(
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
    """weighted[routed row] = its routing weight * down(activated[routed row]), by its expert's projection."""
    down_tile(
        activated,
        down_proj,
        top_k_weights,
        row_order,
        tile_expert,
        num_routed,
        weighted,
        NUM_EXPERTS,
        HIDDEN,
        WIDTH,
        TILE_ROWS,
        TILE_WIDTH,
        TILE_DEPTH,
        WEIGHTS_FIRST,
    )


@triton.jit
def combine_kernel(weighted, output, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """output[row] = the sum of its k weighted routed rows, in the order of its experts: the same sum in every run."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < HIDDEN
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in tl.static_range(TOP_K):
        total += tl.load(weighted + (row * TOP_K + place) * HIDDEN + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * HIDDEN + columns, total.to(output.dtype.element_ty), mask=inside)
