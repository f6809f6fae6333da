"""Attention as in `kernel.py`, for Hopper: copies, matrix products and exponentials at the same time.

A program owns a tile of 128 query rows and 256 columns of the values. It has three groups of four warps, one that copies keys
and values into shared memory and two that compute 64 rows each: see `hopper_groups.py`. Compiled by Triton, `kernel.py` has
every warp do everything in turn, and the tensor cores wait for exponentials and for the addresses of copies. So this is in
Gluon, which says who does what; neither Triton's interpreter nor other GPUs can run it.

The keys of a tile are counted in blocks: first the cached ones, then the new ones, both from a multiple of BLOCK_KEYS on. So
where a prompt is cut at such multiples, a row's keys are in the same blocks wherever it is cut, and the row is the same bit for
bit. Programs that share a tile's keys take consecutive blocks.

All else is as in `kernel.py`: the tiles of a sequence, what a row sees, float32 for what is kept from block to block, memory
that no row may see is never loaded, indices are brought within what the tensors hold. With several splits the outputs are those
of `split_kernel.py`.
"""

# ruff: noqa: N803 - constants are in capitals

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from plugins.attention.hopper_groups import GROUP_WARPS, compute, copy, within
from plugins.attention.kernel import NEVER, SEARCHED

_STAGES = gl.constexpr(2)  # buffers of keys, and of values


@gluon.jit(do_not_specialize=("num_sequences", "page_columns", "num_tokens", "num_pages", "num_splits"))
def hopper_attention_kernel(
    query,
    new_kv,
    kv_pages,
    page_table,
    prefix_lengths,
    sequence_starts,
    image_block_ids,
    num_sequences,
    page_columns,
    num_tokens,
    num_pages,
    num_splits,
    result,
    log_weights,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
    BLOCK_VALUES: gl.constexpr,
):
    """Grid: (T // tokens of a tile + B, K * D / BLOCK_VALUES, num_splits). Outputs: result [splits, T, H, D], log_weights
    [splits, T, H] float32."""
    GROUP: gl.constexpr = NUM_HEADS // NUM_KV_HEADS
    TOKENS: gl.constexpr = BLOCK_ROWS // GROUP
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [GROUP_WARPS], [0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)

    candidates = gl.arange(0, SEARCHED, LINE)
    sequence = -1
    for first in range(0, num_sequences, SEARCHED):
        each = first + candidates
        starts = gl.load(sequence_starts + each, mask=each < num_sequences, other=NEVER)
        sequence += gl.sum((starts // TOKENS + each <= gl.program_id(0)).to(gl.int32), 0)
    sequence = gl.maximum(sequence, 0)
    begin = within(gl.load(sequence_starts + sequence), num_tokens)
    num_new = within(gl.load(sequence_starts + sequence + 1), num_tokens) - begin
    first_token = (gl.program_id(0) - begin // TOKENS - sequence) * TOKENS
    kv_head = gl.program_id(1) // (HEAD_DIM // BLOCK_VALUES)
    first_column = gl.program_id(1) % (HEAD_DIM // BLOCK_VALUES) * BLOCK_VALUES
    split = gl.program_id(2)
    if (first_token >= 0) & (first_token < num_new):
        prefix = within(gl.load(prefix_lengths + sequence), page_columns * PAGE_SIZE)
        image_ids = image_block_ids + begin
        first = 0
        if WINDOW:
            first = gl.minimum(gl.maximum(prefix - WINDOW + 1 + (first_token if CAUSAL else 0), 0), prefix)
        first_new = 0
        stop_new = num_new
        if CAUSAL:
            own = first_token + gl.arange(0, BLOCK_ROWS, LINE)
            images = gl.load(image_ids + own, mask=own < gl.minimum(first_token + TOKENS, num_new), other=-1)
            if gl.max(images, 0) < 0:  # the tokens of an image see each other wherever they are
                stop_new = gl.minimum(first_token + TOKENS, num_new)
                if WINDOW:
                    first_new = gl.maximum(first_token - WINDOW + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
        begin_cached = first // BLOCK_KEYS * BLOCK_KEYS
        num_cached = gl.cdiv(prefix - begin_cached, BLOCK_KEYS)
        num_blocks = num_cached + gl.cdiv(stop_new - first_new, BLOCK_KEYS)
        share = gl.cdiv(num_blocks, num_splits)
        begin_block = split * share
        stop_block = gl.maximum(gl.minimum(begin_block + share, num_blocks), begin_block + 1)  # a block without keys, if none
        segments = (num_cached, first - begin_cached, prefix - begin_cached, first_new, stop_new - first_new)

        queries = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_ROWS, HEAD_DIM], SHARED)
        keys = gl.allocate_shared_memory(gl.bfloat16, [_STAGES, BLOCK_KEYS, HEAD_DIM], SHARED)
        values = gl.allocate_shared_memory(gl.bfloat16, [_STAGES, BLOCK_KEYS, BLOCK_VALUES], SHARED)
        keys_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
        keys_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
        values_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
        values_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
        # Every thread that copies says that a buffer is full, each group that computes that it is empty.
        for stage in gl.static_range(_STAGES):
            mbarrier.init(keys_full.index(stage), count=32 * GROUP_WARPS)
            mbarrier.init(keys_empty.index(stage), count=2)
            mbarrier.init(values_full.index(stage), count=32 * GROUP_WARPS)
            mbarrier.init(values_empty.index(stage), count=2)
        first_row = (begin + first_token).to(gl.int64) * NUM_HEADS + kv_head * GROUP
        first_output = split.to(gl.int64) * num_tokens * NUM_HEADS + first_row
        buffers = (keys, values, keys_full, keys_empty, values_full, values_empty)
        blocks = (begin_block, stop_block)
        own_pages = page_table + sequence.to(gl.int64) * page_columns
        cache = (kv_pages + kv_head * HEAD_DIM, own_pages, num_pages, begin_cached)
        own_kv = new_kv + (begin.to(gl.int64) * 2 * NUM_KV_HEADS + kv_head) * HEAD_DIM
        to_values = NUM_KV_HEADS * HEAD_DIM + first_column
        own_query = query + first_row * HEAD_DIM
        outputs = (result + first_output * HEAD_DIM + first_column, log_weights + first_output)
        # Counted from the tile's first token: how many there are, where the cached and the new keys begin, of which images.
        tile = (num_new - first_token, first_token + prefix - begin_cached, first_new - first_token, image_ids + first_token)
        rows = (queries, own_query, outputs)
        gl.warp_specialize(
            [
                (copy, (buffers, blocks, segments, cache, own_kv, to_values, PAGE_SIZE, 2 * NUM_KV_HEADS * HEAD_DIM)),
                (compute, (0, rows, buffers, blocks, segments, tile, CAUSAL, WINDOW, NUM_HEADS, GROUP)),
                (compute, (1, rows, buffers, blocks, segments, tile, CAUSAL, WINDOW, NUM_HEADS, GROUP)),
            ],
            [GROUP_WARPS, GROUP_WARPS],
            [232, 232] if HEAD_DIM == 256 else [224, 224],  # registers of a thread that computes; those that copy get the rest
        )
