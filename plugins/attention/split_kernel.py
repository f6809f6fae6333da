"""Attention over long prefixes: the cached keys divided among programs, and the kernel that merges what they found.

Few query tiles over a long prefix leave most of the device idle; splitting the keys fills it (flash decoding).

    paged_attention_split_kernel    as `paged_attention_kernel`, over one split of the keys each
        partial      [splits, T, H, D] float32: output of the split's own softmax, 0 where it saw no key
        log_weights  [splits, T, H] float32: log2 of its sum of exponentiated scores, -infinity where it saw no key
    combine_kernel                  partial results, weighted by 2^log_weights → output [T, H, D]
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.attention.kernel import NEVER, SEARCHED, attend, row_offsets, within


@triton.jit(do_not_specialize=("num_sequences", "page_columns", "num_tokens", "num_pages", "num_splits"))
def paged_attention_split_kernel(
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
    partial,
    log_weights,
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
    """Grid: (T // tokens of a tile + B, K * D / BLOCK_VALUES, num_splits)."""
    TOKENS: tl.constexpr = BLOCK_ROWS // (NUM_HEADS // NUM_KV_HEADS)
    sequence = -1
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
    split = tl.program_id(2)
    if (first_token >= 0) & (first_token < num_new):
        accumulated, largest, total = attend(
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
            split,
            num_splits,
            CAUSAL,
            WINDOW,
            NUM_HEADS,
            NUM_KV_HEADS,
            HEAD_DIM,
            PAGE_SIZE,
            BLOCK_ROWS,
            BLOCK_KEYS,
            BLOCK_VALUES,
            True,
        )
        offsets, valid = row_offsets(first_token, num_new, kv_head, NUM_HEADS, NUM_KV_HEADS, BLOCK_ROWS)
        first_row = (split.to(tl.int64) * num_tokens + begin) * NUM_HEADS
        columns = first_column + tl.arange(0, BLOCK_VALUES)
        empty = total == 0
        mean = accumulated / tl.where(empty, 1.0, total)[:, None]
        tl.store(partial + first_row * HEAD_DIM + offsets[:, None] * HEAD_DIM + columns[None, :], mean, mask=valid[:, None])
        log_weight = tl.where(empty, float("-inf"), largest + tl.log2(tl.where(empty, 1.0, total)))
        # The programs of a head's other columns write the same numbers.
        tl.store(log_weights + first_row + offsets, log_weight, mask=valid)


@triton.jit(do_not_specialize=("num_rows", "num_splits"))
def combine_kernel(
    partial,
    log_weights,
    num_rows,
    num_splits,
    output,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Grid: (rows / BLOCK_ROWS,); num_rows = T * H. Every row saw some key, so some weight is above 0."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    splits = tl.arange(0, MAX_SPLITS)
    columns = tl.arange(0, HEAD_DIM)
    valid = rows < num_rows
    present = (splits < num_splits)[:, None] & valid[None, :]
    entries = splits.to(tl.int64)[:, None] * num_rows + rows[None, :]
    log_weight = tl.load(log_weights + entries, mask=present, other=float("-inf"))
    parts = tl.load(partial + entries[:, :, None] * HEAD_DIM + columns[None, None, :], mask=present[:, :, None], other=0.0)
    largest = tl.where(valid, tl.max(log_weight, 0), 0.0)
    weights = tl.exp2(log_weight - largest[None, :])
    merged = tl.sum(weights[:, :, None] * parts, 0) / tl.where(valid, tl.sum(weights, 0), 1.0)[:, None]
    rows = rows.to(tl.int64)
    tl.store(output + rows[:, None] * HEAD_DIM + columns[None, :], merged.to(output.dtype.element_ty), mask=valid[:, None])
