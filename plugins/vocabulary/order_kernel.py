"""The k-th largest of a row's processed logits, without sorting.

    1. A lane of a block meets a BLOCK-th part of the vocabulary. The k-th largest of the lanes' maxima is a limit that at least
       k tokens reach, and hardly more: equals, and those that share their lane with a larger one.
    2. The tokens that reach it are listed, in the order of the vocabulary. The k-th largest of them is the row's.

Where a lane is not enough for each (k above BLOCK), or the list is not (many equals), the whole row is searched instead.

The search is for a word, one bit after the other: a float32 number's bits, the first flipped, where it is negative the others
too, are a 32-bit word in the order of the numbers.
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.vocabulary.kernel import processed_logits

STAGES = tl.constexpr(4)
"""Blocks of logits that a loop has on their way, so that a row alone keeps the memory busy."""


@triton.jit
def ordered_words(numbers):
    """float32 → uint32 in the same order, equals where they are."""
    bits = (numbers + 0.0).to(tl.int32, bitcast=True)  # -0 becomes +0
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def from_ordered_word(word):
    """The number of `ordered_words`."""
    bits = word.to(tl.int32, bitcast=True)
    return (bits ^ (~(bits >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(raw_logits, processing, k, listed, VOCAB_SIZE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """The word of a row's k-th largest processed logit, its place among those equal to it, from 1, and the length of the list.

    k: from 1 to VOCAB_SIZE. listed: [BLOCK] int32 of scratch, where the list of 2. is left: tokens with every one from the k-th
    largest on; if its length is more than BLOCK there is none. The others: see `processed_logits`.
    """
    places = tl.arange(0, BLOCK)
    length = VOCAB_SIZE + BLOCK
    if k <= BLOCK:
        maxima = tl.full([BLOCK], float("-inf"), tl.float32)  # 1.
        for begin in tl.range(0, VOCAB_SIZE, BLOCK, num_stages=STAGES):
            processed = processed_logits(raw_logits, processing, begin + places, VOCAB_SIZE, CAP)
            maxima = tl.maximum(maxima, processed)
        limit, _ = _kth_of_block(ordered_words(maxima), k)
        limit = from_ordered_word(limit)
        length = 0  # 2.
        for begin in tl.range(0, VOCAB_SIZE, BLOCK, num_stages=STAGES):
            columns = begin + places
            processed = processed_logits(raw_logits, processing, columns, VOCAB_SIZE, CAP)
            if tl.max(processed, 0) >= limit:
                reaches = ((processed >= limit) & (columns < VOCAB_SIZE)).to(tl.int32)
                at = length + tl.cumsum(reaches, 0) - 1
                tl.store(listed + at, columns, mask=(reaches > 0) & (at < BLOCK))
                length += tl.sum(reaches, 0)
    if length <= BLOCK:
        processed = listed_logits(raw_logits, processing, listed, length, VOCAB_SIZE, CAP, BLOCK)[1]
        word, place = _kth_of_block(ordered_words(processed), k)
    else:
        word, place = _kth_of_row(raw_logits, processing, k, VOCAB_SIZE, CAP, BLOCK)
    return word, place, length


@triton.jit
def listed_logits(
    raw_logits,
    processing,
    listed,
    length,
    VOCAB_SIZE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tokens of a list, VOCAB_SIZE behind its end, and their processed logits, there -infinity: both [BLOCK]."""
    tl.debug_barrier()  # other threads may have written it
    places = tl.arange(0, BLOCK)
    columns = tl.load(listed + places, mask=places < length, other=VOCAB_SIZE)
    return columns, processed_logits(raw_logits, processing, columns, VOCAB_SIZE, CAP)


@triton.jit
def _kth_of_block(words, k):
    """The k-th largest of a block's words, and its place among equals."""
    found = tl.full((), 0, tl.uint32)
    highest = tl.full((), 2147483648, tl.uint32)
    for bit in range(32):
        trial = found | (highest >> bit)
        found = tl.where(tl.sum((words >= trial).to(tl.int32), 0) >= k, trial, found)
    return found, k - tl.sum((words > found).to(tl.int32), 0)


@triton.jit
def _kth_of_row(raw_logits, processing, k, VOCAB_SIZE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """As `_kth_of_block`, of a row's processed logits; reads them once for each bit."""
    found = tl.full((), 0, tl.uint32)
    highest = tl.full((), 2147483648, tl.uint32)
    for bit in range(32):
        trial = found | (highest >> bit)
        reach = _count(raw_logits, processing, trial, VOCAB_SIZE, CAP, BLOCK)
        found = tl.where(reach >= k, trial, found)
    return found, k - _count(raw_logits, processing, found + 1, VOCAB_SIZE, CAP, BLOCK)


@triton.jit
def _count(raw_logits, processing, word, VOCAB_SIZE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a row's tokens have a word of `word` or more."""
    places = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int32)
    for begin in tl.range(0, VOCAB_SIZE, BLOCK, num_stages=STAGES):
        columns = begin + places
        words = ordered_words(processed_logits(raw_logits, processing, columns, VOCAB_SIZE, CAP))
        counts += ((words >= word) & (columns < VOCAB_SIZE)).to(tl.int32)
    return tl.sum(counts, 0)
