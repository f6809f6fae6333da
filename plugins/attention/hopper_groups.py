"""What the groups of warps of `hopper_kernel.py` do: one copies, two compute.

    copy       the keys and then the values of a block, as soon as their buffers are empty
    compute    of 64 rows: the next block's scores; the values of this block, weighted; the next block's softmax. The group that
               waits for exponentials leaves the tensor cores to the other one.

There are STAGES buffers for keys and as many for values. A buffer is used for every STAGES-th block; the phase of its barriers
alternates.

buffers: keys [STAGES, BLOCK_KEYS, D] and values [STAGES, BLOCK_KEYS, BLOCK_VALUES]; barriers: keys are there, keys have been
read, and so for values. blocks: the first, and the one after the last. segments: how many blocks are of cached keys; of those,
counted from the first block on, the first key and the one after the last; the first new token that is a key, and how many are.
"""

# ruff: noqa: N803 - constants are in capitals

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from plugins.attention.kernel import LOG2_E, LOWEST

GROUP_WARPS = gl.constexpr(4)
_ROWS = gl.constexpr(64)  # of a group that computes, as of one matrix instruction
_COPIED = gl.constexpr(8)  # rows that are copied together: after as many the order of shared memory repeats


@gluon.jit
def copy(buffers, blocks, segments, cache, new_kv, to_values, PAGE_SIZE: gl.constexpr, STRIDE: gl.constexpr):
    """cache: the head's keys, the sequence's pages, how many pages there are, the token at which the first block begins.
    new_kv: keys of the sequence and head. to_values: from a key to the columns of its value. STRIDE: between tokens."""
    keys, values, keys_full, keys_empty, values_full, values_empty = buffers
    kv_pages, pages, num_pages, begin_cached = cache
    num_cached, _, cached_keys, first_new, _ = segments
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_KEYS: gl.constexpr = keys.shape[1]
    PART: gl.constexpr = BLOCK_KEYS if BLOCK_KEYS < PAGE_SIZE else PAGE_SIZE  # tokens at constant distances
    last_page = gl.maximum(begin_cached + cached_keys - 1, 0) // PAGE_SIZE
    for block in range(blocks[0], blocks[1]):
        stage, phase = _turn(block - blocks[0], STAGES)
        place, low, high = _extent(block, segments, BLOCK_KEYS)
        bases = ()
        for part in gl.static_range(BLOCK_KEYS // PART):
            base = new_kv + (first_new + place + part * PART).to(gl.int64) * STRIDE
            if block < num_cached:
                position = begin_cached + place + part * PART
                page = within(gl.load(pages + gl.minimum(position // PAGE_SIZE, last_page)), num_pages - 1)
                base = kv_pages + (page.to(gl.int64) * PAGE_SIZE + position % PAGE_SIZE) * STRIDE
            bases += (base,)
        mbarrier.wait(keys_empty.index(stage), phase ^ 1)
        _copy_block(keys.index(stage), bases, 0, low, high, PART, STRIDE)
        async_copy.mbarrier_arrive(keys_full.index(stage), increment_count=False)
        mbarrier.wait(values_empty.index(stage), phase ^ 1)
        _copy_block(values.index(stage), bases, to_values, low, high, PART, STRIDE)
        async_copy.mbarrier_arrive(values_full.index(stage), increment_count=False)
    async_copy.wait_group(0)


@gluon.jit
def _copy_block(buffer, bases, first_column, low, high, PART: gl.constexpr, STRIDE: gl.constexpr):
    """Starts the copies of a block. Its rows before `low` and from `high` on become 0.

    A few rows at a time, whose addresses are constants away from each other: else a thread holds all of its addresses.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [GROUP_WARPS, 1], [1, 0])
    BLOCK_KEYS: gl.constexpr = buffer.shape[0]
    rows = gl.arange(0, _COPIED, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, buffer.shape[1], gl.SliceLayout(0, LAYOUT))
    offsets = rows[:, None] * STRIDE + columns[None, :]
    if (low <= 0) & (high >= BLOCK_KEYS):
        for first in gl.static_range(0, BLOCK_KEYS, _COPIED):
            pointers = bases[first // PART] + first_column + first % PART * STRIDE + offsets
            async_copy.async_copy_global_to_shared(buffer.slice(first, _COPIED, 0), pointers)
    else:
        for first in gl.static_range(0, BLOCK_KEYS, _COPIED):
            pointers = bases[first // PART] + first_column + first % PART * STRIDE + offsets
            loaded = (rows >= low - first) & (rows < high - first)
            async_copy.async_copy_global_to_shared(buffer.slice(first, _COPIED, 0), pointers, mask=loaded[:, None])


@gluon.jit
def compute(
    INDEX: gl.constexpr,
    rows,
    buffers,
    blocks,
    segments,
    tile,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
):
    """INDEX: the group's. rows: room for them in shared memory [BLOCK_ROWS, D]; the tile's first one; where the tile's results
    begin, and the logarithms of its sums. tile: see the kernel. GROUP: query heads that share a key/value head."""
    queries, query, outputs = rows
    keys, values, keys_full, keys_empty, values_full, values_empty = buffers
    num_tokens, _, _, image_ids = tile
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_KEYS: gl.constexpr = keys.shape[1]
    HEAD_DIM: gl.constexpr = keys.shape[2]
    BLOCK_VALUES: gl.constexpr = values.shape[2]
    TOKENS: gl.constexpr = queries.shape[0] // GROUP
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [GROUP_WARPS, 1], [16, BLOCK_KEYS, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [GROUP_WARPS, 1], [16, BLOCK_VALUES, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [GROUP_WARPS, 1], [1, 0])
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [GROUP_WARPS, 1], [1, 0])

    own_queries = queries.slice(INDEX * _ROWS, _ROWS, 0)
    lanes = INDEX * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, LOADED))
    offsets, valid = _row_offsets(lanes, num_tokens, NUM_HEADS, GROUP, TOKENS)
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LOADED))
    own_queries.store(gl.load(query + offsets[:, None] * HEAD_DIM + columns[None, :], mask=valid[:, None], other=0.0))
    tokens = (INDEX * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, SCORES))) // GROUP
    images = tokens
    if CAUSAL:
        images = gl.load(image_ids + tokens, mask=tokens < num_tokens, other=-1)

    largest = gl.full([_ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([_ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    accumulated = gl.zeros([_ROWS, BLOCK_VALUES], gl.float32, VALUES)
    nothing = gl.zeros([_ROWS, BLOCK_KEYS], gl.float32, SCORES)
    mbarrier.wait(keys_full.index(0), 0)
    fence_async_shared()
    scores = warpgroup_mma(own_queries, keys.index(0).permute((1, 0)), nothing, use_acc=False)
    mbarrier.arrive(keys_empty.index(0), count=1)
    weights, shrink, largest, total = _softmax(
        INDEX, scores, blocks[0], segments, tile, tokens, images, largest, total, CAUSAL, WINDOW, GROUP
    )
    factor = gl.convert_layout(weights.to(gl.bfloat16), FACTOR)
    for block in range(blocks[0] + 1, blocks[1]):
        stage, phase = _turn(block - blocks[0], STAGES)
        last_stage, last_phase = _turn(block - blocks[0] - 1, STAGES)
        mbarrier.wait(keys_full.index(stage), phase)
        fence_async_shared()
        scores = warpgroup_mma(own_queries, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        accumulated = accumulated * gl.convert_layout(shrink, gl.SliceLayout(1, VALUES))[:, None]
        mbarrier.wait(values_full.index(last_stage), last_phase)
        fence_async_shared()
        accumulated = warpgroup_mma(factor, values.index(last_stage), accumulated, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(keys_empty.index(stage), count=1)
        weights, shrink, largest, total = _softmax(
            INDEX, scores, block, segments, tile, tokens, images, largest, total, CAUSAL, WINDOW, GROUP
        )
        accumulated, factor = warpgroup_mma_wait(0, deps=[accumulated, factor])
        mbarrier.arrive(values_empty.index(last_stage), count=1)
        factor = gl.convert_layout(weights.to(gl.bfloat16), FACTOR)

    stage, phase = _turn(blocks[1] - blocks[0] - 1, STAGES)
    mbarrier.wait(values_full.index(stage), phase)
    fence_async_shared()
    accumulated = accumulated * gl.convert_layout(shrink, gl.SliceLayout(1, VALUES))[:, None]
    accumulated = warpgroup_mma(factor, values.index(stage), accumulated)

    empty = total == 0
    log_weight = gl.where(empty, float("-inf"), largest + gl.log2(gl.where(empty, 1.0, total)))
    total = gl.convert_layout(gl.where(empty, 1.0, total), gl.SliceLayout(1, VALUES))
    mean = (accumulated / total[:, None]).to(outputs[0].dtype.element_ty)
    # Through shared memory, to write whole lines; in another layout than the queries', whose addresses the compiler would keep.
    if outputs[0].dtype.element_ty == queries.dtype:
        written = own_queries.slice(0, BLOCK_VALUES, 1)
        written.store(mean)
        mean = written.load(STORED)
    lanes = INDEX * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, mean.type.layout))
    offsets, valid = _row_offsets(lanes, num_tokens, NUM_HEADS, GROUP, TOKENS)
    columns = gl.arange(0, BLOCK_VALUES, gl.SliceLayout(0, mean.type.layout))
    gl.store(outputs[0] + offsets[:, None] * HEAD_DIM + columns[None, :], mean, mask=valid[:, None])
    # The programs of a head's other columns write the same numbers.
    lanes = INDEX * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, SCORES))
    offsets, valid = _row_offsets(lanes, num_tokens, NUM_HEADS, GROUP, TOKENS)
    gl.store(outputs[1] + offsets, log_weight, mask=valid)


@gluon.jit
def _softmax(
    INDEX: gl.constexpr,
    scores,
    block,
    segments,
    tile,
    tokens,
    images,
    largest,
    total,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    GROUP: gl.constexpr,
):
    """A block's weights, before they are divided by their sum; what shrinks all before it; the new maximum and sum."""
    BLOCK_KEYS: gl.constexpr = scores.shape[1]
    keys = gl.arange(0, BLOCK_KEYS, gl.SliceLayout(0, scores.type.layout))
    place, low, high = _extent(block, segments, BLOCK_KEYS)
    if CAUSAL:
        FIRST: gl.constexpr = INDEX * _ROWS // GROUP
        LAST: gl.constexpr = (INDEX * _ROWS + _ROWS - 1) // GROUP
        _, to_cached, to_new, image_ids = tile
        place = gl.where(block < segments[0], place - to_cached, place + to_new)  # from here on from the tile's first token
        hides = (high < BLOCK_KEYS) | (place + BLOCK_KEYS - 1 > FIRST)
        if WINDOW:
            hides = hides | (place <= LAST - WINDOW)
        if hides:  # some key from some row
            diagonal = (tokens - place)[:, None]
            hidden = keys[None, :] > diagonal
            if WINDOW:
                hidden = hidden | (keys[None, :] <= diagonal - WINDOW)
            key_images = gl.load(image_ids + place + keys, mask=(keys < high) & (block >= segments[0]), other=-1)
            hidden = hidden & ((images[:, None] != key_images[None, :]) | (images < 0)[:, None])
            scores = gl.where(hidden | (keys >= high)[None, :], float("-inf"), scores)
    else:
        if (low > 0) | (high < BLOCK_KEYS):
            scores = gl.where(((keys >= low) & (keys < high))[None, :], scores, float("-inf"))
    new_largest = gl.maximum(largest, gl.max(scores, 1) * LOG2_E)
    shrink = gl.exp2(largest - new_largest)
    weights = gl.exp2(scores * LOG2_E - new_largest[:, None])
    return weights, shrink, new_largest, total * shrink + gl.sum(weights, 1)


@gluon.jit
def _turn(use, STAGES: gl.constexpr):
    """Of the use of a buffer, counted from 0: the buffer, and the phase of its barriers. STAGES: a power of two."""
    return use & (STAGES - 1), (use // STAGES) & 1


@gluon.jit
def _extent(block, segments, BLOCK_KEYS: gl.constexpr):
    """Of a block: the place of its first key, counted from the segment's first block; the keys that it has, from and to."""
    num_cached, first_cached, cached_keys, _, new_keys = segments
    cached = block < num_cached
    place = gl.where(cached, block, block - num_cached) * BLOCK_KEYS
    return place, gl.where(cached, first_cached - place, 0), gl.where(cached, cached_keys, new_keys) - place


@gluon.jit
def _row_offsets(rows, num_tokens, NUM_HEADS: gl.constexpr, GROUP: gl.constexpr, TOKENS: gl.constexpr):
    """Of rows of the tile: token * H + head, counted from its first, and whether they exist. num_tokens: from its first on."""
    tokens = rows // GROUP
    return tokens * NUM_HEADS + rows % GROUP, (tokens < num_tokens) & (tokens < TOKENS)


@gluon.jit
def within(value, most):
    return gl.minimum(gl.maximum(value, 0), most)
