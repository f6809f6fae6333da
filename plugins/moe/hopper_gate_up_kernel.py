"""The first product of packed experts and of those in 4 bits, for Hopper and many rows: activated [N * k, F], to the bit as
`packed_kernel.py`.

As in `hopper_down_kernel.py` weights are unpacked while the tensor cores multiply. But rows are too long to be kept: four warps
copy them, 64 columns at a time, and two groups of four multiply. A group has two blocks of the weight's rows, and unpacks the
numbers of one while those of the other are multiplied. There are as many programs as multiprocessors, and each goes through
many parts of tiles without a pause.

    copy        columns 0 … 63 of a tile's rows, 64 … 127, … into the next of STAGES buffers that is empty
    group 0     blocks 0 and 1 of the part: with each buffer the product of the one, then of the other
    group 1     blocks 2 and 3, if there are any

See `plugins.moe.kernel` for the shape legend, `hopper_factor_kernel.py` for what words become.
"""

# ruff: noqa: N803 - constants are in capitals

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from plugins.moe.hopper_factor_kernel import factor_of, words
from plugins.moe.hopper_tile_kernel import GROUP_WARPS, GROUPS, REGISTERS, routed_rows, store_weighted
from plugins.moe.packing import PLANES

PAIR = 2
"""Blocks that a group has at a time. Also the steps of 64 columns in a turn of its loop, as far as words are loaded ahead."""

PART = 4
"""Blocks of a part: a pair for each group."""

_PAIR, _PART, _PLANES = gl.constexpr(PAIR), gl.constexpr(PART), gl.constexpr(PLANES)
_STAGES = gl.constexpr(8)
_SEARCHED = gl.constexpr(1024)  # tiles at a time


@gluon.jit(do_not_specialize=("num_routed", "num_tiles"))
def hopper_gate_up_packed_kernel(
    hidden,
    gate_up_proj,
    row_order,
    tile_expert,
    num_routed,
    num_tiles,
    activated,
    NUM_EXPERTS: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    DEPTH: gl.constexpr,
    WIDTH: gl.constexpr,
    TOP_K: gl.constexpr,
    TILE_ROWS: gl.constexpr,
    TILE_DEPTH: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCK: gl.constexpr,
    STRIDE: gl.constexpr,
    FACTOR: gl.constexpr,
):
    """Grid: (programs). As `gate_up_packed_kernel`, but of words, STRIDE a block; tiles in use come before all others. DEPTH: a
    multiple of 128. NUM_BLOCKS: even."""
    gl.static_assert((TILE_DEPTH == BLOCK) & (BLOCKS == _PART) & (NUM_BLOCKS % _PAIR == 0) & (DEPTH % (_PAIR * BLOCK) == 0))
    STEPS: gl.constexpr = DEPTH // BLOCK
    WORDS: gl.constexpr = BLOCK * BLOCK // 8
    FOUR_BITS: gl.constexpr = "int4" if STRIDE == STEPS * (WORDS + BLOCK) else "nvfp4"
    KIND: gl.constexpr = "packed" if STRIDE >= STEPS * _PLANES * WORDS else FOUR_BITS
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [GROUP_WARPS], [0])
    used = 0
    for start in range(0, num_tiles, _SEARCHED):
        tiles = start + gl.arange(0, _SEARCHED, LINE)
        expert = gl.load(tile_expert + tiles, mask=tiles < num_tiles, other=-1)
        used += gl.sum(((expert >= 0) & (expert < NUM_EXPERTS)).to(gl.int32), 0)
    if used > 0:
        rows = gl.allocate_shared_memory(hidden.dtype.element_ty, [_STAGES, TILE_ROWS, BLOCK], gl.NVMMASharedLayout(128, 16))
        results = gl.allocate_shared_memory(
            activated.dtype.element_ty, [GROUPS, TILE_ROWS, BLOCK // 2], gl.NVMMASharedLayout(64, 16)
        )
        full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(_STAGES):  # every thread that copies says that it is full, each group that it is empty
            mbarrier.init(full.index(stage), count=32 * GROUP_WARPS)
            mbarrier.init(empty.index(stage), count=GROUPS)
        tiles = (row_order, tile_expert, num_routed, used)
        buffers = (rows, full, empty)
        outputs = (results, activated)
        gl.warp_specialize(
            [
                (copy, (tiles, buffers, hidden, STEPS, NUM_BLOCKS, TOP_K)),
                (multiply, (0, tiles, buffers, gate_up_proj, outputs, STEPS, NUM_BLOCKS, WIDTH, STRIDE, FACTOR, KIND)),
                (multiply, (1, tiles, buffers, gate_up_proj, outputs, STEPS, NUM_BLOCKS, WIDTH, STRIDE, FACTOR, KIND)),
            ],
            [GROUP_WARPS, GROUP_WARPS],
            [REGISTERS, REGISTERS],
        )


@gluon.jit
def copy(tiles, buffers, hidden, STEPS: gl.constexpr, NUM_BLOCKS: gl.constexpr, TOP_K: gl.constexpr):
    """tiles: the rows' order, the tiles' experts, how many routed rows there are, and how many tiles in use. buffers: of rows
    [STAGES, TILE_ROWS, BLOCK], and the barriers that say that one is full, and that one is empty."""
    row_order, _, num_routed, used = tiles
    rows, full, empty = buffers
    STAGES: gl.constexpr = rows.shape[0]
    TILE_ROWS: gl.constexpr = rows.shape[1]
    BLOCK: gl.constexpr = rows.shape[2]
    PARTS: gl.constexpr = (NUM_BLOCKS + _PART - 1) // _PART
    COPIED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [GROUP_WARPS, 1], [1, 0])
    columns = gl.arange(0, BLOCK, gl.SliceLayout(0, COPIED))
    use = 0 * used
    for item in range(gl.program_id(0), used * PARTS, gl.num_programs(0)):
        slots = row_order + item // PARTS * TILE_ROWS
        routed, taken = routed_rows(slots, num_routed, TILE_ROWS, gl.SliceLayout(1, COPIED))
        row_at = hidden + gl.where(taken, routed // TOP_K, 0)[:, None].to(gl.int64) * (STEPS * BLOCK) + columns[None, :]
        inside = taken[:, None] & (columns < BLOCK)[None, :]
        for step in range(STEPS):
            stage = use & (STAGES - 1)
            mbarrier.wait(empty.index(stage), ((use // STAGES) & 1) ^ 1)
            async_copy.async_copy_global_to_shared(rows.index(stage), row_at + step * BLOCK, mask=inside)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            use += 1
    async_copy.wait_group(0)


@gluon.jit
def multiply(
    INDEX: gl.constexpr,
    tiles,
    buffers,
    gate_up_proj,
    outputs,
    STEPS: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    WIDTH: gl.constexpr,
    STRIDE: gl.constexpr,
    FACTOR: gl.constexpr,
    KIND: gl.constexpr,
):
    """INDEX: the group's. outputs: room for a result of each group, and where results go."""
    row_order, tile_expert, num_routed, used = tiles
    rows, full, empty = buffers
    results, activated = outputs
    STAGES: gl.constexpr = rows.shape[0]
    TILE_ROWS: gl.constexpr = rows.shape[1]
    BLOCK: gl.constexpr = rows.shape[2]
    PARTS: gl.constexpr = (NUM_BLOCKS + _PART - 1) // _PART
    WORDS: gl.constexpr = BLOCK * BLOCK // 8
    STEP: gl.constexpr = _PLANES * WORDS if KIND == "packed" else WORDS + BLOCK
    TURNS: gl.constexpr = STEPS // _PAIR
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [GROUP_WARPS, 1], [16, TILE_ROWS, 16])
    FACTORS: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [GROUP_WARPS, 1], [1, 0])

    num_items = used * PARTS
    first = gl.minimum(gl.program_id(0), num_items - 1)
    block, own = _pair_of(INDEX, first, tile_expert, PARTS, NUM_BLOCKS, STRIDE)
    coming = _words_of_turn(gate_up_proj + own, KIND, STEP, STRIDE, BLOCK)
    use = 0 * used
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        following = gl.minimum(item + gl.num_programs(0), num_items - 1)
        next_block, next_own = _pair_of(INDEX, following, tile_expert, PARTS, NUM_BLOCKS, STRIDE)
        if block < NUM_BLOCKS:
            left = gl.zeros([BLOCK, TILE_ROWS], gl.float32, PRODUCT)
            right = gl.zeros([BLOCK, TILE_ROWS], gl.float32, PRODUCT)
            for turn in range(TURNS):
                then = gl.where(turn + 1 < TURNS, own + (turn + 1) * (_PAIR * STEP), next_own)
                later = ()
                right_pairs = coming[0][0]
                for step in gl.static_range(_PAIR):
                    stage = use & (STAGES - 1)
                    factor, left_pairs = factor_of(coming[2 * step], KIND, FACTORS)
                    later += (words(gate_up_proj + then + step * STEP, KIND, BLOCK),)
                    mbarrier.wait(full.index(stage), (use // STAGES) & 1)
                    fence_async_shared()
                    columns = rows.index(stage).permute((1, 0))
                    left = warpgroup_mma(factor, columns, left, is_async=True)
                    if step > 0:
                        right_pairs = warpgroup_mma_wait(1, deps=[right_pairs])  # its registers are free from here on
                        mbarrier.arrive(empty.index((use - 1) & (STAGES - 1)), count=1)
                    factor, right_pairs = factor_of(coming[2 * step + 1], KIND, FACTORS)
                    later += (words(gate_up_proj + then + STRIDE + step * STEP, KIND, BLOCK),)
                    right = warpgroup_mma(factor, columns, right, is_async=True)
                    left_pairs = warpgroup_mma_wait(1, deps=[left_pairs])
                    use += 1
                left, right, right_pairs = warpgroup_mma_wait(0, deps=[left, right, right_pairs])
                mbarrier.arrive(empty.index((use - 1) & (STAGES - 1)), count=1)
                coming = later
            slots = row_order + item // PARTS * TILE_ROWS
            routed, taken = routed_rows(slots, num_routed, TILE_ROWS, gl.SliceLayout(1, STORED))
            line = gl.where(taken, routed, -1) * (2 * WIDTH // BLOCK)  # in blocks of the output
            ends = gate_up_proj + own + (STRIDE - BLOCK)
            _store(left, ends, block, results.index(INDEX), activated, line, FACTOR, KIND, STORED)
            _store(right, ends + STRIDE, block + 1, results.index(INDEX), activated, line, FACTOR, KIND, STORED)
        else:  # the other group has the last blocks of the weight
            for _ in range(STEPS):
                mbarrier.wait(full.index(use & (STAGES - 1)), (use // STAGES) & 1)
                mbarrier.arrive(empty.index(use & (STAGES - 1)), count=1)
                use += 1
            coming = _words_of_turn(gate_up_proj + next_own, KIND, STEP, STRIDE, BLOCK)
        block, own = next_block, next_own


@gluon.jit
def _pair_of(
    INDEX: gl.constexpr,
    item,
    tile_expert,
    PARTS: gl.constexpr,
    NUM_BLOCKS: gl.constexpr,
    STRIDE: gl.constexpr,
):
    """The group's first block in an item, a part of a tile, and how many words are before it; if it is none, before another."""
    expert = gl.load(tile_expert + item // PARTS)
    block = item % PARTS * _PART + INDEX * _PAIR
    return block, (expert.to(gl.int64) * NUM_BLOCKS + gl.minimum(block, NUM_BLOCKS - _PAIR)) * STRIDE


@gluon.jit
def _words_of_turn(at, KIND: gl.constexpr, STEP: gl.constexpr, STRIDE: gl.constexpr, BLOCK: gl.constexpr):
    """Of each step those of both blocks."""
    loaded = ()
    for step in gl.static_range(_PAIR):
        loaded += (words(at + step * STEP, KIND, BLOCK), words(at + STRIDE + step * STEP, KIND, BLOCK))
    return loaded


@gluon.jit
def _store(
    product,
    end,
    block,
    room,
    activated,
    line,
    FACTOR: gl.constexpr,
    KIND: gl.constexpr,
    STORED: gl.constexpr,
):
    """As `plugins.moe.arranged_kernel` stores what the product of a block is activated to. end: the block's last words, as
    many as it has rows."""
    BLOCK: gl.constexpr = product.shape[0]
    TILE_ROWS: gl.constexpr = product.shape[1]
    if KIND != "int4":
        columns = gl.arange(0, BLOCK, gl.SliceLayout(1, product.type.layout))
        product = product * gl.load(end + columns).to(gl.float32, bitcast=True)[:, None]
    gate, up = gl.split(product.reshape((4, 2, 8, TILE_ROWS)).permute((0, 2, 3, 1)))
    gate, up = gate.reshape((BLOCK // 2, TILE_ROWS)), up.reshape((BLOCK // 2, TILE_ROWS))
    sigmoid = 1 / (1 + gl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    store_weighted(gate * sigmoid * up * FACTOR, room, activated, line, block, STORED)
