"""The second product of packed experts, and of FP8 experts with rows in float16, for Hopper and many rows: weighted
[N * k, D], to the bit as `packed_kernel.py` and `fp8_kernel.py`.

Compiled by Triton, those kernels copy a tile's rows into shared memory for every tile of columns, and between two products
every warp unpacks weights while the tensor cores wait. Here a program keeps its rows, all of their columns, and goes through
blocks of 64 of the weight's rows; it has two groups of four warps, each with blocks of its own. A group issues the product of
64 columns and unpacks the next 64 meanwhile, from words that it loaded AHEAD steps before. So this is in Gluon, which says what
happens when; neither Triton's interpreter nor other GPUs can run it.

    program    row 0 … 127, kept          group 0: blocks 0, 2, 4 …       group 1: blocks 1, 3, 5 …
    step       factor (registers) x columns of the rows (shared memory) → product (registers); the next factor is unpacked

See `plugins.moe.kernel` for the shape legend, `plugins.moe.packing` and `plugins.moe.arranging` for the words.
"""

# ruff: noqa: N803 - constants are in capitals

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from plugins.moe.hopper_tile_kernel import (
    GROUP_WARPS,
    GROUPS,
    REGISTERS,
    copy_rows,
    routed_rows,
    store_of_rows,
    store_weighted,
)
from plugins.moe.packing import PLANES, SIGNS, WHOLE

AHEAD = 3
"""Of packed experts. NVIDIA H200, Triton 3.6, 2048 / 16384 rows: 195 / 1006 µs; 2: 217 / 1120; 4, with registers in memory:
1274 at 16384. Words through shared memory, two or three groups: 1034, 1010."""

FP8_AHEAD = 4
"""Of FP8 experts. The same: 186 / 983 µs; 2: 208 / 1075; 3: 195 / 1010; 5: 185 / 991."""

MAX_STEPS = 11
"""Of 64 columns, for which shared memory has room. NVIDIA H200, Triton 3.6, packed experts, this kernel at 2048 / 4096 / 8192 /
16384 rows: 195 / 323 / 534 / 1006 µs, Triton's 212 / 353 / 639 / 1235; FP8 experts: 186 / 287 / 524 / 983, 219 / 344 / 637 /
1196. At 1024 rows, where that one's tiles have 64: 141 for 139 and 130 for 134; with such tiles here: 154 for the latter."""

_AHEAD, _FP8_AHEAD = gl.constexpr(AHEAD), gl.constexpr(FP8_AHEAD)
_PLANES, _FP8_PLANES = gl.constexpr(PLANES), gl.constexpr(2)
_SIGNS, _WHOLE = gl.constexpr(SIGNS), gl.constexpr(WHOLE)


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
    """As `down_packed_kernel`, but for the tile: TILE_DEPTH is BLOCK, WIDTH a multiple of it."""
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
):
    """One program. Grid: (NUM_BLOCKS / BLOCKS, tiles). DEPTH: F. WIDTH: D. scales: none of packed weights, else those
    of the weight [E, D] and of the rows."""
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
                (multiply, (0, tile, blocks, outputs, DEPTH, WIDTH, STRIDE)),
                (multiply, (1, tile, blocks, outputs, DEPTH, WIDTH, STRIDE)),
            ],
            [GROUP_WARPS],
            [REGISTERS],
        )


@gluon.jit
def multiply(INDEX: gl.constexpr, tile, blocks, outputs, DEPTH: gl.constexpr, WIDTH: gl.constexpr, STRIDE: gl.constexpr):
    """INDEX: the group's. tile: its rows [STEPS, TILE_ROWS, BLOCK] and barriers, BLOCK columns each; where they come from.
    blocks: the expert's weights; their scale, if they are not packed; the program's first block and the one after its last.
    outputs: room for a result, for each group; the rows' weights and scales [2, TILE_ROWS]; where results go."""
    rows, there, activated, slots, num_routed = tile
    weights, weight_scale, first, stop = blocks
    PACKED: gl.constexpr = len(weight_scale) == 0
    results, of_rows, weighted = outputs
    STEPS: gl.constexpr = rows.shape[0]
    TILE_ROWS: gl.constexpr = rows.shape[1]
    BLOCK: gl.constexpr = rows.shape[2]
    PLANES: gl.constexpr = _PLANES if PACKED else _FP8_PLANES
    NEXT: gl.constexpr = 1 + (_AHEAD if PACKED else _FP8_AHEAD)  # of the steps, whose words are to be loaded
    STEP: gl.constexpr = PLANES * BLOCK * BLOCK // 8  # words
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
    factor = factor_of(words(begin, PLANES, BLOCK), FACTOR)
    coming = ()
    for step in gl.static_range(1, NEXT):
        coming += (words(begin + step * STEP, PLANES, BLOCK),)
    previous = factor
    for block in range(first + INDEX, stop, GROUPS):
        own = weights + block * STRIDE
        following = weights + gl.minimum(block + GROUPS, stop - 1) * STRIDE
        columns = gl.arange(0, BLOCK, gl.SliceLayout(1, PRODUCT))
        if PACKED:
            scale = gl.load(own + (STRIDE - BLOCK) + columns).to(gl.float32, bitcast=True)
        else:
            scale = gl.load(weight_scale[0] + block * BLOCK + columns)
        product = gl.zeros([BLOCK, TILE_ROWS], gl.float32, PRODUCT)
        for step in gl.static_range(STEPS):
            if block == first + INDEX:
                mbarrier.wait(there.index(step), 0)
                fence_async_shared()
            product = warpgroup_mma(factor, rows.index(step).permute((1, 0)), product, use_acc=step > 0, is_async=True)
            previous = warpgroup_mma_wait(1, deps=[previous])  # the registers of the factor before are free from here on
            next_factor = factor_of(coming[0], FACTOR)
            at = own + (step + NEXT) * STEP if step + NEXT < STEPS else following + (step + NEXT - STEPS) * STEP
            coming = coming[1:] + (words(at, PLANES, BLOCK),)  # noqa: RUF005 - Gluon has no stars
            previous = factor
            factor = next_factor
        product, previous = warpgroup_mma_wait(0, deps=[product, previous])
        product = product * scale[:, None]
        if not PACKED:
            product = product * of_rows.index(1).load(gl.SliceLayout(0, PRODUCT))[None, :]
        product = product * of_rows.index(0).load(gl.SliceLayout(0, PRODUCT))[None, :]
        store_weighted(product, results.index(INDEX), weighted, line, block, LOADED)
    async_copy.wait_group(0)


@gluon.jit
def words(at, PLANES: gl.constexpr, BLOCK: gl.constexpr):
    """at: the words of 64 columns of a block. Returns their planes, three of packed numbers and two of FP8 ones; a thread has
    those of the numbers that it multiplies."""
    WORDS: gl.constexpr = BLOCK * BLOCK // 8
    at += gl.arange(0, WORDS, gl.BlockedLayout([4], [32], [GROUP_WARPS], [0]))
    planes = ()
    for plane in gl.static_range(PLANES):
        planes += (gl.load(at + plane * WORDS),)
    return planes


@gluon.jit
def factor_of(planes, FACTOR: gl.constexpr):
    """[64, 64] numbers in the layout FACTOR."""
    return unpacked(planes, FACTOR) if len(planes) == 3 else widened(planes, FACTOR)


@gluon.jit
def unpacked(planes, FACTOR: gl.constexpr):
    """[64, 64] bfloat16 in the layout FACTOR, as `plugins.moe.numbers_kernel.packed_numbers`."""
    first, second, third = planes
    fourth = ((first >> 4) & 0x07800780) | ((second >> 8) & 0x00780078) | ((third >> 12) & 0x00070007) | ((third << 4) & _SIGNS)
    pair = gl.join(gl.join(first & _WHOLE, second & _WHOLE), gl.join(third & _WHOLE, fourth))  # [words, right, next]
    # A pair of numbers stays in its register: seen through, its halves would be masked apart and put together again.
    pair = gl.inline_asm_elementwise("", "=r,0", [pair], dtype=gl.int32, is_pure=True, pack=1)
    even = (pair & 0xFFFF).to(gl.uint16).to(gl.bfloat16, bitcast=True)
    odd = (pair >> 16).to(gl.uint16).to(gl.bfloat16, bitcast=True)
    number = gl.join(even, odd).reshape((4, 8, 4, 2, 2, 2, 2, 2))
    # warp, lane_row, lane_column, upper, far, right, next, odd
    number = number.permute((0, 3, 1, 4, 6, 5, 2, 7)).reshape((64, 64))
    return gl.convert_layout(number, FACTOR, assert_trivial=True)


@gluon.jit
def widened(planes, FACTOR: gl.constexpr):
    """[64, 64] float16 in the layout FACTOR, as `plugins.moe.numbers_kernel.wide_numbers`."""
    words = gl.join(planes[0], planes[1])
    pair = gl.join(words, words >> 16)  # in the lower half, [words, upper, right]
    # A pair of numbers stays in its register: seen through, its bytes would be taken apart and put together again.
    pair = gl.inline_asm_elementwise("", "=r,0", [pair], dtype=gl.int32, is_pure=True, pack=1)
    number = gl.join((pair & 0xFF).to(gl.uint8), ((pair >> 8) & 0xFF).to(gl.uint8)).to(gl.float8e4nv, bitcast=True)
    number = number.to(gl.float16).reshape((4, 8, 4, 2, 2, 2, 2, 2))
    # warp, lane_row, lane_column, far, next, upper, right, odd
    number = number.permute((0, 5, 1, 3, 4, 6, 2, 7)).reshape((64, 64))
    return gl.convert_layout(number, FACTOR, assert_trivial=True)
