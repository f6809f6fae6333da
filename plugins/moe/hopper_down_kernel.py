"""The second product of packed experts, of those in 4 bits, and of FP8 experts with rows in float16, for Hopper and many rows:
weighted [N * k, D], to the bit as `packed_kernel.py` and `fp8_kernel.py`.

Compiled by Triton, those kernels copy a tile's rows into shared memory for every tile of columns, and between two products
every warp unpacks weights while the tensor cores wait. Here a program keeps its rows, all of their columns, and goes through
blocks of 64 of the weight's rows; it has two groups of four warps, each with blocks of its own. A group issues the product of
64 columns and unpacks the next 64 meanwhile, from words that it loaded AHEAD steps before. So this is in Gluon, which says what
happens when; neither Triton's interpreter nor other GPUs can run it.

    program    row 0 … 127, kept          group 0: blocks 0, 2, 4 …       group 1: blocks 1, 3, 5 …
    step       factor (registers) x columns of the rows (shared memory) → product (registers); the next factor is unpacked

See `plugins.moe.kernel` for the shape legend, `hopper_factor_kernel.py` for what words become.
"""

# ruff: noqa: N803 - constants are in capitals

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from plugins.moe.hopper_factor_kernel import factor_of, words
from plugins.moe.hopper_tile_kernel import (
    GROUP_WARPS,
    GROUPS,
    REGISTERS,
    copy_rows,
    routed_rows,
    store_of_rows,
    store_weighted,
)
from plugins.moe.packing import PLANES

AHEAD = 4
"""Of packed experts. NVIDIA H200, Triton 3.6, 2048 / 4096 / 8192 / 16384 rows: 188 / 297 / 538 / 1010 µs; 3: 191 / 298 / 537 /
1027. Words through shared memory, two or three groups, at 16384, where as much as this took 1006: 1034, 1010."""

FP8_AHEAD = 4
"""Of FP8 experts. The same: 161 / 264 / 476 / 959 µs; 5: 156 / 259 / 490 / 906."""

FOUR_BIT_AHEAD = 5
"""Of experts in 4 bits. The same, int4 and NVFP4: 155 / 253 / 471 / 884 and 161 / 269 / 476 / 939 µs; 4: 157 / 258 / 463 / 914
and 168 / 275 / 516 / 966; 3: 167 / 276 / 500 / 959 and 179 / 293 / 522 / 1003."""

DEPTHS = range(6, 12)
"""How many times 64 columns: more than are loaded ahead, and what shared memory has room for. In the same runs Triton's kernels
took 214 / 353 / 630 / 1297 µs of packed experts, 190 / 324 / 580 / 1108 of FP8 ones, and 204 / 325 / 580 / 1168 and 197 / 336 /
605 / 1201 of those in 4 bits; at 1024 rows, in tiles of 64: 139, 114, 117 and 123 for 136, 110, 103 and 112."""

_PLANES = gl.constexpr(PLANES)
_AHEAD, _FP8_AHEAD, _FOUR_BIT_AHEAD = gl.constexpr(AHEAD), gl.constexpr(FP8_AHEAD), gl.constexpr(FOUR_BIT_AHEAD)


@gluon.jit(do_not_specialize=("num_routed",))
def hopper_down_packed_kernel(
    activated,
    down_proj,
    top_k_weights,
    row_order,
    tile_expert,
    num_routed,
    weighted,
    NUM_EXPERTS: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    DEPTH: gl.constexpr,
    WIDTH: gl.constexpr,
    TILE_ROWS: gl.constexpr,
    TILE_DEPTH: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
):
    """As `down_packed_kernel`, but for the tile, TILE_DEPTH is BLOCK, WIDTH a multiple of it; and of words, STRIDE a block."""
    STEPS: gl.constexpr = (DEPTH + BLOCK - 1) // BLOCK
    WORDS: gl.constexpr = BLOCK * BLOCK // 8
    FOUR_BITS: gl.constexpr = "int4" if STRIDE == STEPS * (WORDS + BLOCK) else "nvfp4"
    KIND: gl.constexpr = "packed" if STRIDE >= STEPS * _PLANES * WORDS else FOUR_BITS
    second_product(
        activated,
        down_proj,
        (),
        top_k_weights,
        row_order,
        tile_expert,
        num_routed,
        weighted,
        NUM_EXPERTS,
        NUM_BLOCKS,
        DEPTH,
        WIDTH,
        TILE_ROWS,
        TILE_DEPTH,
        BLOCKS,
        BLOCK,
        STRIDE,
        KIND,
    )


@gluon.jit(do_not_specialize=("num_routed",))
def hopper_down_wide_kernel(
    activated,
    row_scale,
    down_proj,
    weight_scale,
    top_k_weights,
    row_order,
    tile_expert,
    num_routed,
    weighted,
    NUM_EXPERTS: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    DEPTH: gl.constexpr,
    WIDTH: gl.constexpr,
    TILE_ROWS: gl.constexpr,
    TILE_DEPTH: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
):
    """As `down_fp8_kernel` with rows in float16, but for the tile: TILE_DEPTH is BLOCK, WIDTH a multiple of it, DEPTH one of 8;
    and down_proj is words of four numbers, STRIDE a block."""
    second_product(
        activated,
        down_proj,
        (weight_scale, row_scale),
        top_k_weights,
        row_order,
        tile_expert,
        num_routed,
        weighted,
        NUM_EXPERTS,
        NUM_BLOCKS,
        DEPTH,
        WIDTH,
        TILE_ROWS,
        TILE_DEPTH,
        BLOCKS,
        BLOCK,
        STRIDE,
        "wide",
    )


@gluon.jit
def second_product(
    activated,
    down_proj,
    scales,
    top_k_weights,
    row_order,
    tile_expert,
    num_routed,
    weighted,
    NUM_EXPERTS: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    DEPTH: gl.constexpr,
    WIDTH: gl.constexpr,
    TILE_ROWS: gl.constexpr,
    TILE_DEPTH: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    KIND: gl.constexpr,
):
    """One program. Grid: (NUM_BLOCKS / BLOCKS, tiles). DEPTH: F. WIDTH: D. scales: of FP8 weights those of the
    weight [E, D] and of the rows, else none. KIND: see `hopper_factor_kernel.py`."""
    gl.static_assert(TILE_DEPTH == BLOCK)
    STEPS: gl.constexpr = (DEPTH + BLOCK - 1) // BLOCK
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [GROUP_WARPS], [0])

    expert = gl.load(tile_expert + gl.program_id(1))
    if (expert >= 0) & (expert < NUM_EXPERTS):
        rows = gl.allocate_shared_memory(activated.dtype.element_ty, [STEPS, TILE_ROWS, BLOCK], SHARED)
        results = gl.allocate_shared_memory(weighted.dtype.element_ty, [GROUPS, TILE_ROWS, BLOCK], SHARED)
        numbers: gl.constexpr = 1 + len(scales) // 2  # of a row: its weight and its scale
        of_rows = gl.allocate_shared_memory(gl.float32, [numbers, TILE_ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        there = gl.allocate_shared_memory(gl.int64, [STEPS, 1], mbarrier.MBarrierLayout())
        for step in gl.static_range(STEPS):
            mbarrier.init(there.index(step), count=32 * GROUP_WARPS)
        slots = row_order + gl.program_id(1) * TILE_ROWS
        routed, taken = routed_rows(slots, num_routed, TILE_ROWS, LINE)
        store_of_rows(of_rows.index(0), top_k_weights, routed, taken)
        weight_scale = ()
        if len(scales) == 2:
            weight_scale += (scales[0] + expert.to(gl.int64) * WIDTH,)
            store_of_rows(of_rows.index(1), scales[1], routed, taken)
        weights = down_proj + expert.to(gl.int64) * (NUM_BLOCKS * STRIDE)
        first = gl.program_id(0) * BLOCKS
        tile = (rows, there, activated, slots, num_routed)
        blocks = (weights, weight_scale, first, gl.minimum(first + BLOCKS, NUM_BLOCKS))
        outputs = (results, of_rows, weighted)
        gl.warp_specialize(
            [
                (multiply, (0, tile, blocks, outputs, DEPTH, WIDTH, STRIDE, KIND)),
                (multiply, (1, tile, blocks, outputs, DEPTH, WIDTH, STRIDE, KIND)),
            ],
            [GROUP_WARPS],
            [REGISTERS],
        )


@gluon.jit
def multiply(
    INDEX: gl.constexpr,
    tile,
    blocks,
    outputs,
    DEPTH: gl.constexpr,
    WIDTH: gl.constexpr,
    STRIDE: gl.constexpr,
    KIND: gl.constexpr,
):
    """INDEX: the group's. tile: its rows [STEPS, TILE_ROWS, BLOCK] and barriers, BLOCK columns each; where they come from.
    blocks: the expert's weights; their scale, if they are FP8 ones; the program's first block and the one after its last.
    outputs: room for a result, for each group; the rows' weights and scales [2, TILE_ROWS]; where results go."""
    rows, there, activated, slots, num_routed = tile
    weights, weight_scale, first, stop = blocks
    WIDE: gl.constexpr = KIND == "wide"
    results, of_rows, weighted = outputs
    STEPS: gl.constexpr = rows.shape[0]
    TILE_ROWS: gl.constexpr = rows.shape[1]
    BLOCK: gl.constexpr = rows.shape[2]
    AHEAD: gl.constexpr = _AHEAD if KIND == "packed" else _FP8_AHEAD if WIDE else _FOUR_BIT_AHEAD
    NEXT: gl.constexpr = AHEAD + 1  # of the steps, whose words are to be loaded
    WORDS: gl.constexpr = BLOCK * BLOCK // 8
    STEP: gl.constexpr = _PLANES * WORDS if KIND == "packed" else 2 * WORDS if WIDE else WORDS + BLOCK
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [GROUP_WARPS, 1], [1, 0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [GROUP_WARPS, 1], [16, TILE_ROWS, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)

    routed, taken = routed_rows(slots, num_routed, TILE_ROWS, gl.SliceLayout(1, LOADED))
    for copied in gl.static_range(INDEX, STEPS, GROUPS):
        copy_rows(rows.index(copied), activated, routed, taken, copied * BLOCK, DEPTH, LOADED)
        async_copy.mbarrier_arrive(there.index(copied), increment_count=False)
    # In blocks of the output, which a thread need not hold as pointers.
    line = gl.where(taken, routed, -1) * (WIDTH // BLOCK)

    begin = weights + gl.minimum(first + INDEX, stop - 1) * STRIDE
    factor, pairs = factor_of(words(begin, KIND, BLOCK), KIND, FACTOR)
    coming = ()
    for step in gl.static_range(1, NEXT):
        coming += (words(begin + step * STEP, KIND, BLOCK),)
    previous = pairs
    for block in range(first + INDEX, stop, GROUPS):
        own = weights + block * STRIDE
        following = weights + gl.minimum(block + GROUPS, stop - 1) * STRIDE
        columns = gl.arange(0, BLOCK, gl.SliceLayout(1, PRODUCT))
        if WIDE:
            scale = gl.load(weight_scale[0] + block * BLOCK + columns)
        elif KIND != "int4":
            scale = gl.load(own + (STRIDE - BLOCK) + columns).to(gl.float32, bitcast=True)
        product = gl.zeros([BLOCK, TILE_ROWS], gl.float32, PRODUCT)
        for step in gl.static_range(STEPS):
            if block == first + INDEX:
                mbarrier.wait(there.index(step), 0)
                fence_async_shared()
            product = warpgroup_mma(factor, rows.index(step).permute((1, 0)), product, use_acc=step > 0, is_async=True)
            previous = warpgroup_mma_wait(1, deps=[previous])  # the registers of the factor before are free from here on
            next_factor, next_pairs = factor_of(coming[0], KIND, FACTOR)
            at = own + (step + NEXT) * STEP if step + NEXT < STEPS else following + (step + NEXT - STEPS) * STEP
            coming = coming[1:] + (words(at, KIND, BLOCK),)  # noqa: RUF005 - Gluon has no stars
            previous = pairs
            factor, pairs = next_factor, next_pairs
        product, previous = warpgroup_mma_wait(0, deps=[product, previous])
        if KIND != "int4":
            product = product * scale[:, None]
        if WIDE:
            product = product * of_rows.index(1).load(gl.SliceLayout(0, PRODUCT))[None, :]
        product = product * of_rows.index(0).load(gl.SliceLayout(0, PRODUCT))[None, :]
        store_weighted(product, results.index(INDEX), weighted, line, block, LOADED)
    async_copy.wait_group(0)
