"""Attention over paged, cached keys and values and over the new tokens' own: one Triton kernel for every layer of the model.

A program owns a tile: BLOCK_ROWS query rows, which are consecutive tokens of one sequence times the query heads that share one
key/value head, so that a key or value is loaded once for all of them.

    1. Find the sequence that the tile belongs to. The tiles of sequence b start at tile starts[b] // tokens of a tile + b: room
       for every sequence before it, whatever the lengths, and no sum over them. A sequence may leave its last tile unused.
    2. Load the query rows.
    3. Go through the cached keys that some row of the tile sees, a block at a time, pages looked up in the page table.
    4. Go through the new keys that some row of the tile sees.
    5. Divide by the sum of the weights and store.

3 and 4 keep a running maximum, sum and weighted values (online softmax), in float32. Memory that no row of the tile may see is
never loaded, but for new keys that share a block with seen ones, and lanes beyond the end of a block read as 0, so that
unwritten slots may hold anything, NaN included. Blocks begin at multiples of BLOCK_KEYS, of the cached keys and of the new
ones: where a prompt is cut at such multiples, a row is the same bit for bit wherever it is cut.

Lengths, starts and page numbers are brought within what the tensors hold before they are used: a TensorRT builder times a
plugin on made-up inputs, and a kernel that faults ends the build.

1 is written out in each kernel: behind a call, PyTorch would take sequence_starts for an output and copy it.

The names and layouts of the arguments are the package's; besides: num_sequences = B, page_columns = P, num_tokens = T,
num_pages = N. Tensors are contiguous.
The arguments are in the order that TensorRT's ahead-of-time plugins pass them: inputs, int32 scalars, outputs, constants.
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Where the running maximum starts: below every score, and finite, so that blocks without a visible key need no special case.
LOWEST = tl.constexpr(-1e30)
SEARCHED = tl.constexpr(64)  # sequences looked at together in 1.
NEVER = tl.constexpr(1 << 30)  # stands for the start of a sequence that does not exist, in 1.


@triton.jit(do_not_specialize=("num_sequences", "page_columns", "num_tokens", "num_pages"))
def paged_attention_kernel(
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
    output,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """Grid: (T // tokens of a tile + B, K * D / BLOCK_VALUES). Output: [T, H, D]."""
    TOKENS: tl.constexpr = BLOCK_ROWS // (NUM_HEADS // NUM_KV_HEADS)
    sequence = -1  # 1.
    for first in range(0, num_sequences, SEARCHED):
        candidates = first + tl.arange(0, SEARCHED)
        starts = tl.load(sequence_starts + candidates, mask=candidates < num_sequences, other=NEVER)
        sequence += tl.sum((starts // TOKENS + candidates <= tl.program_id(0)).to(tl.int32), 0)
    sequence = tl.maximum(sequence, 0)
    begin = within(tl.load(sequence_starts + sequence), num_tokens)
    num_new = within(tl.load(sequence_starts + sequence + 1), num_tokens) - begin
    first_token = (tl.program_id(0) - begin // TOKENS - sequence) * TOKENS
    begin = begin.to(tl.int64)
    kv_head = tl.program_id(1) // (HEAD_DIM // BLOCK_VALUES)
    first_column = tl.program_id(1) % (HEAD_DIM // BLOCK_VALUES) * BLOCK_VALUES
    if (first_token >= 0) & (first_token < num_new):
        accumulated, _, total = attend(
            query,
            new_kv,
            kv_pages,
            page_table + sequence.to(tl.int64) * page_columns,
            within(tl.load(prefix_lengths + sequence), page_columns * PAGE_SIZE),
            num_pages,
            image_block_ids,
            begin,
            num_new,
            first_token,
            kv_head,
            first_column,
            0,
            1,
            CAUSAL,
            WINDOW,
            NUM_HEADS,
            NUM_KV_HEADS,
            HEAD_DIM,
            PAGE_SIZE,
            BLOCK_ROWS,
            BLOCK_KEYS,
            BLOCK_VALUES,
            False,
        )
        offsets, valid = row_offsets(first_token, num_new, kv_head, NUM_HEADS, NUM_KV_HEADS, BLOCK_ROWS)  # 5.
        columns = first_column + tl.arange(0, BLOCK_VALUES)
        pointers = output + begin * NUM_HEADS * HEAD_DIM + offsets[:, None] * HEAD_DIM + columns[None, :]
        tl.store(pointers, (accumulated / total[:, None]).to(output.dtype.element_ty), mask=valid[:, None])


@triton.jit
def within(value, most):
    """`value`, if it is from 0 to `most`; else the nearer of the two."""
    return tl.minimum(tl.maximum(value, 0), most)


@triton.jit
def row_offsets(first_token, num_new, kv_head, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Of each row of a tile: token * H + head, counted from the sequence's first token; and whether it exists."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    rows = tl.arange(0, BLOCK_ROWS)
    tokens = first_token + rows // GROUP
    valid = (tokens < num_new) & (rows < BLOCK_ROWS // GROUP * GROUP)
    return tokens * NUM_HEADS + kv_head * GROUP + rows % GROUP, valid


@triton.jit
def attend(
    query,
    new_kv,
    kv_pages,
    pages,
    prefix,
    num_pages,
    image_block_ids,
    begin,
    num_new,
    first_token,
    kv_head,
    first_column,
    split,
    num_splits,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile over its share of the keys: weighted values [rows, D], largest score (times log2 e) and sum of weights [rows].

    pages: the sequence's row of the page table. begin: the sequence's first packed row; first_token: the tile's, counted from
    there. SPLIT: the keys, cached and new, are divided among num_splits programs.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    TOKEN_STRIDE: tl.constexpr = 2 * NUM_KV_HEADS * HEAD_DIM
    columns = tl.arange(0, HEAD_DIM)
    keys = tl.arange(0, BLOCK_KEYS)
    tokens = first_token + tl.arange(0, BLOCK_ROWS) // GROUP

    offsets, valid = row_offsets(first_token, num_new, kv_head, NUM_HEADS, NUM_KV_HEADS, BLOCK_ROWS)  # 2.
    query += begin * NUM_HEADS * HEAD_DIM
    queries = tl.load(query + offsets[:, None] * HEAD_DIM + columns[None, :], mask=valid[:, None], other=0.0)

    largest = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    accumulated = tl.zeros([BLOCK_ROWS, BLOCK_VALUES], tl.float32)
    to_values = NUM_KV_HEADS * HEAD_DIM + first_column + tl.arange(0, BLOCK_VALUES)

    first = 0
    if WINDOW:
        # Encoding, a row sees the WINDOW keys up to itself. Denoising, all rows see the same WINDOW - 1 cached keys.
        first = tl.maximum(prefix - WINDOW + 1 + (first_token if CAUSAL else 0), 0)
    first_new = 0
    stop_new = num_new
    images = tokens
    if CAUSAL:
        images = tl.load(image_block_ids + begin + tokens, mask=tokens < num_new, other=-1)
        # The tokens of an image see each other wherever they are: a tile that holds one looks at every new key.
        if tl.max(images, 0) < 0:
            stop_new = tl.minimum(first_token + BLOCK_ROWS // GROUP, num_new)
            if WINDOW:
                first_new = tl.maximum(first_token - WINDOW + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    begin_cached = tl.minimum(first, prefix) // BLOCK_KEYS * BLOCK_KEYS
    stop_cached = prefix
    if SPLIT:  # this program's share of the cached keys followed by the new ones, in whole blocks
        num_cached = prefix - begin_cached
        share = tl.cdiv(num_cached + stop_new - first_new, num_splits * BLOCK_KEYS) * BLOCK_KEYS
        stop_cached = tl.minimum(begin_cached + (split + 1) * share, prefix)
        begin_cached += split * share
        stop_new = tl.minimum(first_new + tl.maximum((split + 1) * share - num_cached, 0), stop_new)
        first_new += tl.maximum(split * share - num_cached, 0)

    kv_pages += kv_head * HEAD_DIM  # 3.
    page = tl.load(pages + begin_cached // PAGE_SIZE, mask=begin_cached < stop_cached, other=0)
    for start in range(begin_cached, stop_cached, BLOCK_KEYS):
        positions = start + keys
        loaded = (positions >= first) & (positions < stop_cached)
        if PAGE_SIZE % BLOCK_KEYS == 0:  # a block lies within one page: one index, and slots at constant distances
            base = kv_pages + (within(page, num_pages - 1).to(tl.int64) * PAGE_SIZE + start % PAGE_SIZE) * TOKEN_STRIDE
            slots = keys * TOKEN_STRIDE
            # Looked up a block ahead, so that the copies of the next block's keys need not wait for it.
            page = tl.load(pages + tl.minimum(start + BLOCK_KEYS, stop_cached - 1) // PAGE_SIZE)
        else:
            page_of_each = within(tl.load(pages + positions // PAGE_SIZE, mask=loaded, other=0), num_pages - 1)
            base = kv_pages
            slots = (page_of_each.to(tl.int64) * PAGE_SIZE + positions % PAGE_SIZE) * TOKEN_STRIDE
        visible = loaded[None, :]
        if CAUSAL and WINDOW > 0:
            visible = visible & (positions[None, :] > prefix + tokens[:, None] - WINDOW)
        accumulated, largest, total = _absorb(
            queries, base, slots, columns, to_values, loaded, visible, accumulated, largest, total
        )

    new_kv += begin * TOKEN_STRIDE + kv_head * HEAD_DIM  # 4.
    for start in range(first_new, stop_new, BLOCK_KEYS):
        positions = start + keys
        loaded = positions < stop_new
        visible = loaded[None, :]
        if CAUSAL:
            visible = positions[None, :] <= tokens[:, None]
            if WINDOW:
                visible = visible & (positions[None, :] > tokens[:, None] - WINDOW)
            key_images = tl.load(image_block_ids + begin + positions, mask=loaded, other=-1)
            visible = visible | ((images[:, None] == key_images[None, :]) & (images[:, None] >= 0))
            visible = visible & loaded[None, :]
        base = new_kv + start * TOKEN_STRIDE
        slots = keys * TOKEN_STRIDE
        accumulated, largest, total = _absorb(
            queries, base, slots, columns, to_values, loaded, visible, accumulated, largest, total
        )
    return accumulated, largest, total


@triton.jit
def _absorb(queries, base, slots, columns, to_values, loaded, visible, accumulated, largest, total):
    """One block of keys into the online softmax. slots: [keys] pointers; columns, to_values: where in a slot to read."""
    k = tl.load(base + (slots[None, :] + columns[:, None]), mask=loaded[None, :], other=0.0)
    scores = tl.dot(queries, k, input_precision="ieee") * LOG2_E
    scores = tl.where(visible, scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    shrink = tl.exp2(largest - new_largest)
    # In this order ptxas puts the exponentials among the products by `shrink`, which other units compute, and the sum beside
    # the matrix product. Where it did not, heads of 512 took 5 % longer over long prefixes.
    accumulated = accumulated * shrink[:, None]
    weights = tl.exp2(scores - new_largest[:, None])
    v = tl.load(base + (slots[:, None] + to_values[None, :]), mask=loaded[:, None], other=0.0)
    accumulated = tl.dot(weights.to(v.dtype), v, accumulated, input_precision="ieee")
    total = total * shrink + tl.sum(weights, 1)
    return accumulated, new_largest, total
