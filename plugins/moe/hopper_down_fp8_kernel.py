"""The second product of FP8 experts with FP8 rows for Hopper: weighted [N * k, D], to the bit as `fp8_kernel.py`.

As in `hopper_down_kernel.py` a program keeps its rows and goes through blocks of 64 of the weight's rows, in two groups. The
numbers need no unpacking: a group has room for a whole block in shared memory, where the block after is copied while this one
is multiplied, and a thread reads what it copied into the registers that the tensor cores take.

    program    row 0 … 127, kept          group 0: blocks 0, 2, 4 …       group 1: blocks 1, 3, 5 …
    step       factor (registers) x 128 columns of the rows (shared memory) → product → added to the sum, both in registers

Tensor cores sum FP8 products with fewer bits than float32 has, so a step's product is added to the sum by itself. The last step
has 64 columns where that is what remains.

See `plugins.moe.kernel` for the shape legend, `plugins.moe.arranging` for the order of the numbers.
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


@gluon.jit(do_not_specialize=("num_routed",))
def hopper_down_fp8_kernel(
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
    """Grid: (NUM_BLOCKS / BLOCKS, tiles). DEPTH: F, a multiple of 16. WIDTH: D, a multiple of BLOCK. down_proj: words of four
    numbers, STRIDE a block. All else as in `down_fp8_kernel`."""
    gl.static_assert(TILE_DEPTH == 2 * BLOCK)
    STEP: gl.constexpr = TILE_DEPTH * BLOCK // 4  # words
    WHOLE: gl.constexpr = STRIDE // STEP  # steps
    HALF: gl.constexpr = STRIDE // (STEP // 2) % 2
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    expert = gl.load(tile_expert + gl.program_id(1))
    if (expert >= 0) & (expert < NUM_EXPERTS):
        rows = gl.allocate_shared_memory(
            activated.dtype.element_ty, [WHOLE, TILE_ROWS, TILE_DEPTH], gl.NVMMASharedLayout(128, 8)
        )
        words = gl.allocate_shared_memory(gl.int32, [GROUPS * WHOLE, STEP], WORDS)
        if HALF:
            last_layout: gl.constexpr = gl.NVMMASharedLayout(64, 8)
            last_rows = gl.allocate_shared_memory(activated.dtype.element_ty, [1, TILE_ROWS, BLOCK], last_layout)
            last_words = gl.allocate_shared_memory(gl.int32, [GROUPS, STEP // 2], WORDS)
        else:
            last_rows, last_words = rows, words
        results = gl.allocate_shared_memory(
            weighted.dtype.element_ty, [GROUPS, TILE_ROWS, BLOCK], gl.NVMMASharedLayout(128, 16)
        )
        of_rows = gl.allocate_shared_memory(gl.float32, [2 * GROUPS, TILE_ROWS], WORDS)
        there = gl.allocate_shared_memory(gl.int64, [WHOLE + HALF, 1], mbarrier.MBarrierLayout())
        for step in gl.static_range(WHOLE + HALF):
            mbarrier.init(there.index(step), count=32 * GROUP_WARPS)
        slots = row_order + gl.program_id(1) * TILE_ROWS
        weights = down_proj + expert.to(gl.int64) * (NUM_BLOCKS * STRIDE)
        first = gl.program_id(0) * BLOCKS
        tile = (activated, row_scale, top_k_weights, slots, num_routed)
        blocks = (weights, weight_scale + expert.to(gl.int64) * WIDTH, first, gl.minimum(first + BLOCKS, NUM_BLOCKS))
        room = (rows, last_rows, there, words, last_words, results, of_rows)
        gl.warp_specialize(
            [
                (multiply, (0, tile, blocks, room, weighted, DEPTH, WIDTH, STRIDE, HALF)),
                (multiply, (1, tile, blocks, room, weighted, DEPTH, WIDTH, STRIDE, HALF)),
            ],
            [GROUP_WARPS],
            [REGISTERS],
        )


@gluon.jit
def multiply(
    INDEX: gl.constexpr,
    tile,
    blocks,
    room,
    weighted,
    DEPTH: gl.constexpr,
    WIDTH: gl.constexpr,
    STRIDE: gl.constexpr,
    HALF: gl.constexpr,
):
    """INDEX: the group's. tile: where its rows, their scales and weights come from. blocks: the expert's weights and scales,
    the program's first block and the one after its last. room: shared memory, of each step the rows [TILE_ROWS, TILE_DEPTH],
    their barrier, and the words of each group; for each group a result and two numbers of each row."""
    activated, row_scale, top_k_weights, slots, num_routed = tile
    weights, weight_scale, first, stop = blocks
    rows, last_rows, there, words, last_words, results, of_rows = room
    WHOLE: gl.constexpr = rows.shape[0]
    STEPS: gl.constexpr = WHOLE + HALF
    TILE_ROWS: gl.constexpr = rows.shape[1]
    STEP: gl.constexpr = words.shape[1]
    BLOCK: gl.constexpr = results.shape[2]
    COPIED: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [GROUP_WARPS, 1], [1, 0])
    LAST_COPIED: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [GROUP_WARPS, 1], [1, 0])
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [GROUP_WARPS, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [GROUP_WARPS], [0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [GROUP_WARPS, 1], [16, TILE_ROWS, 32])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4)
    WORDS: gl.constexpr = gl.BlockedLayout([4], [32], [GROUP_WARPS], [0])

    # All that waits for memory by itself is asked for at first.
    copied, copied_taken = routed_rows(slots, num_routed, TILE_ROWS, gl.SliceLayout(1, COPIED))
    last_copied, last_copied_taken = routed_rows(slots, num_routed, TILE_ROWS, gl.SliceLayout(1, LAST_COPIED))
    stored, stored_taken = routed_rows(slots, num_routed, TILE_ROWS, gl.SliceLayout(1, STORED))
    scaled, scaled_taken = routed_rows(slots, num_routed, TILE_ROWS, LINE)
    own_words, tile_rows = (), ()  # of each step
    for step in gl.static_range(WHOLE):
        own_words += (words.index(INDEX * WHOLE + step),)
        tile_rows += (rows.index(step),)
    if HALF:
        own_words += (last_words.index(INDEX),)
        tile_rows += (last_rows.index(0),)
    begin = weights + gl.minimum(first + INDEX, stop - 1) * STRIDE
    for step in gl.static_range(STEPS):
        copy_words(own_words[step], begin + step * STEP, WORDS)
    for step in gl.static_range(INDEX, STEPS, GROUPS):
        if step < WHOLE:
            copy_rows(tile_rows[step], activated, copied, copied_taken, step * 2 * BLOCK, DEPTH, COPIED)
        else:
            copy_rows(tile_rows[step], activated, last_copied, last_copied_taken, step * 2 * BLOCK, DEPTH, LAST_COPIED)
        async_copy.mbarrier_arrive(there.index(step), increment_count=False)
    store_of_rows(of_rows.index(2 * INDEX), row_scale, scaled, scaled_taken)
    store_of_rows(of_rows.index(2 * INDEX + 1), top_k_weights, scaled, scaled_taken)
    # In blocks of the output, which a thread need not hold as pointers.
    line = gl.where(stored_taken, stored, -1) * (WIDTH // BLOCK)

    product = gl.zeros([BLOCK, TILE_ROWS], gl.float32, PRODUCT)
    async_copy.wait_group(STEPS - 1)
    factor = own_words[0].load(WORDS)
    for block in range(first + INDEX, stop, GROUPS):
        following = weights + gl.minimum(block + GROUPS, stop - 1) * STRIDE
        scale = gl.load(weight_scale + block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, PRODUCT)))
        total = gl.zeros([BLOCK, TILE_ROWS], gl.float32, PRODUCT)
        for step in gl.static_range(STEPS):
            if block == first + INDEX:
                mbarrier.wait(there.index(step), 0)
                fence_async_shared()
            numbers = as_numbers(factor, BLOCK, FACTOR)
            # What the product was is of no use; that it is named keeps it in its registers.
            product = warpgroup_mma(numbers, tile_rows[step].permute((1, 0)), product, use_acc=False, is_async=True)
            copy_words(own_words[step], following + step * STEP, WORDS)
            async_copy.wait_group(STEPS - 1)
            next_factor = own_words[(step + 1) % STEPS].load(WORDS)
            product, factor = warpgroup_mma_wait(0, deps=[product, factor])  # the factor's registers are free from here on
            total += product
            factor = next_factor
        total = total * scale[:, None] * of_rows.index(2 * INDEX).load(gl.SliceLayout(0, PRODUCT))[None, :]
        total = total * of_rows.index(2 * INDEX + 1).load(gl.SliceLayout(0, PRODUCT))[None, :]
        store_weighted(total, results.index(INDEX), weighted, line, block, STORED)
    async_copy.wait_group(0)


@gluon.jit
def copy_words(room, at, WORDS: gl.constexpr):
    """A thread copies what it will read: `room` is loaded in the same layout."""
    async_copy.async_copy_global_to_shared(room, at + gl.arange(0, room.shape[0], WORDS))
    async_copy.commit_group()


@gluon.jit
def as_numbers(words, BLOCK: gl.constexpr, FACTOR: gl.constexpr):
    """[64, columns] e4m3 in the layout FACTOR, as `plugins.moe.numbers_kernel.narrow_numbers`."""
    COLUMNS: gl.constexpr = words.shape[0] * 4 // BLOCK
    # The words stay in their registers: seen through, each of their bytes would have one.
    words = gl.inline_asm_elementwise("", "=r,0", [words], dtype=gl.int32, is_pure=True, pack=1)
    first, second = (words & 0xFF).to(gl.uint8), ((words >> 8) & 0xFF).to(gl.uint8)
    third, fourth = ((words >> 16) & 0xFF).to(gl.uint8), ((words >> 24) & 0xFF).to(gl.uint8)
    number = gl.join(gl.join(first, third), gl.join(second, fourth)).to(gl.float8e4nv, bitcast=True)
    number = number.reshape((COLUMNS // BLOCK, 2, 4, 8, 4, 2, 2, 4))
    # 64 columns, upper, warp, lane_row, lane_column, far, right, byte
    number = number.permute((2, 1, 3, 0, 5, 6, 4, 7)).reshape((BLOCK, COLUMNS))
    return gl.convert_layout(number, FACTOR, assert_trivial=True)
