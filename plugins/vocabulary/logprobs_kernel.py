"""Log probabilities of the rows that want them: of the argmax, and of the most likely tokens, as many as are asked for.

The kernel's steps:

    1. The value of the last of these tokens, as `order_kernel` finds it.
    2. All tokens above it, and of those equal to it the first ones, as many as are wanted: in the order of the vocabulary.
    3. Each goes to its place: behind the likelier ones, and behind the equal ones of a lower number. So the argmax comes first.
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.vocabulary.kernel import processed_logits, processing_of
from plugins.vocabulary.order_kernel import STAGES, kth_largest, listed_logits, ordered_words


@triton.jit
def logprobs_kernel(
    raw_logits,
    temperature,
    bias,
    biased,
    repeated,
    penalties,
    slots,
    argmax,
    logprob,
    positions,
    counts,
    listed,
    found_tokens,
    found_values,
    logprobs,
    tokens,
    values,
    VOCAB_SIZE: tl.constexpr,
    CAP: tl.constexpr,
    CANVAS_LENGTH: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_MOST: tl.constexpr,
):
    """Grid: (R,). counts: [S], at most MOST; below 0 nothing is wanted and nothing is written. listed: [R, BLOCK].
    found_tokens, found_values: [R, MOST], in the order of 2. logprobs: [S, C]; tokens, values: [S, C, MOST]. BLOCK_MOST: MOST
    rounded up to a power of two. CAP: 0 for none."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    count = tl.load(counts + slot).to(tl.int32)
    cell = slot * CANVAS_LENGTH + tl.load(positions + row)
    if count >= 0:
        tl.store(logprobs + cell, tl.load(logprob + row))
    count = tl.minimum(count, VOCAB_SIZE)
    if count > 0:
        raw_logits += row.to(tl.int64) * VOCAB_SIZE
        processing = processing_of(row, slot, temperature, bias, biased, repeated, penalties, VOCAB_SIZE)
        found_tokens += row * MOST
        found_values += row * MOST

        listed += row * BLOCK
        last, among_equals, length = kth_largest(raw_logits, processing, count, listed, VOCAB_SIZE, CAP, BLOCK)  # 1.
        larger_at = 0  # 2.
        equal_at = count - among_equals
        if length <= BLOCK:
            columns, processed = listed_logits(raw_logits, processing, listed, length, VOCAB_SIZE, CAP, BLOCK)
            _take(columns, processed, last, larger_at, equal_at, count, found_tokens, found_values, VOCAB_SIZE)
        else:
            for begin in tl.range(0, VOCAB_SIZE, BLOCK, num_stages=STAGES):
                columns = begin + tl.arange(0, BLOCK)
                processed = processed_logits(raw_logits, processing, columns, VOCAB_SIZE, CAP)
                larger_at, equal_at = _take(
                    columns, processed, last, larger_at, equal_at, count, found_tokens, found_values, VOCAB_SIZE
                )

        tl.debug_barrier()  # 3. reads what other threads have stored
        own = tl.arange(0, BLOCK_MOST)
        token = tl.load(found_tokens + own, mask=own < count, other=VOCAB_SIZE)
        value = tl.load(found_values + own, mask=own < count, other=float("-inf"))
        other_token = tl.load(found_tokens + own[None, :], mask=(own < count)[None, :], other=VOCAB_SIZE)
        other_value = tl.load(found_values + own[None, :], mask=(own < count)[None, :], other=float("-inf"))
        before = (other_value > value[:, None]) | ((other_value == value[:, None]) & (other_token < token[:, None]))
        at = cell * MOST + tl.sum(before.to(tl.int32), 1)
        largest = processed_logits(raw_logits, processing, tl.load(argmax + row), VOCAB_SIZE, CAP)
        tl.store(tokens + at, token.to(tl.int64), mask=own < count)
        tl.store(values + at, value - largest + tl.load(logprob + row), mask=own < count)


@triton.jit
def _take(columns, processed, last, larger_at, equal_at, count, tokens, values, VOCAB_SIZE: tl.constexpr):
    """Stores those of a block that are above `last`, a word, from larger_at on, and those equal to it from equal_at on, up to
    `count`; returns where the next go."""
    words = ordered_words(processed)
    larger = (words > last).to(tl.int32)
    equal = ((words == last) & (columns < VOCAB_SIZE)).to(tl.int32)
    at = tl.where(larger > 0, larger_at + tl.cumsum(larger, 0), equal_at + tl.cumsum(equal, 0)) - 1
    wanted = (larger + equal > 0) & (at < count)
    tl.store(tokens + at, columns, mask=wanted)
    tl.store(values + at, processed, mask=wanted)
    return larger_at + tl.sum(larger, 0), equal_at + tl.sum(equal, 0)
