"""Rows that may only be sampled from some of their tokens: draws again where the token drawn of all is not one of these.

A token's weight is its probability relative to the most likely token's, w = p / max(p). Every filter keeps the tokens of some
weight or more:

    top_k   the k-th largest weight or more
    top_p   tokens whose heavier tokens have less than top_p of the probability that top_k has left
    min_p   min_p or more

    1. top_k and min_p give a limit, which no weight may be below.
    2. A sample lighter than the limit is drawn again: the argmax of processed + noise over the tokens that are not.
    3. top_p, by rejection: where the tokens heavier than the sample have top_p of the probability, neither it nor any lighter
       one may be drawn; draw again. At most 1 - top_p of the rows draw a second time; the most likely token needs no test.

Weights are compared by their processed logits, which end with a product and so are the same in every loop. A difference of two
is not: compilers join a product and a sum where they can. Limits rise with every draw, so that a row comes to its end anyway.

A row is a program, and reads its logits once for each sum and each draw, twice for top_k; without filters not at all.
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.vocabulary.kernel import processed_logits, processing_of
from plugins.vocabulary.noise_kernel import gumbel_from_words, gumbel_words
from plugins.vocabulary.order_kernel import STAGES, from_ordered_word, kth_largest, ordered_words

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def filtered_sample_kernel(
    raw_logits,
    temperature,
    bias,
    biased,
    repeated,
    penalties,
    slots,
    argmax,
    seeds,
    canvas_indices,
    steps,
    positions,
    top_k,
    top_p,
    min_p,
    listed,
    sampled,
    VOCAB_SIZE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (R,). listed: [R, BLOCK]. sampled: [R], overwritten. CAP: 0 for none."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    k = tl.load(top_k + slot).to(tl.int32)
    share = tl.load(top_p + slot)
    least_share = tl.load(min_p + slot)
    picks = (k > 0) & (k < VOCAB_SIZE)
    if picks | (share < 1) | (least_share > 0):
        raw_logits += row.to(tl.int64) * VOCAB_SIZE
        processing = processing_of(row, slot, temperature, bias, biased, repeated, penalties, VOCAB_SIZE)
        largest = processed_logits(raw_logits, processing, tl.load(argmax + row), VOCAB_SIZE, CAP)

        least = float("-inf")  # 1.
        if picks:
            word, _, _ = kth_largest(raw_logits, processing, k, listed + row * BLOCK, VOCAB_SIZE, CAP, BLOCK)
            least = from_ordered_word(word)
        limit = least
        if least_share > 0:
            limit = tl.maximum(least, largest + tl.log(least_share))

        token = tl.load(sampled + row).to(tl.int32)  # 2.
        drawn = processed_logits(raw_logits, processing, token, VOCAB_SIZE, CAP)
        again = drawn < limit
        tests = True
        while again | tests:
            if again:
                token, drawn = _draw(
                    raw_logits,
                    processing,
                    limit,
                    tl.load(seeds + row),
                    tl.load(canvas_indices + row),
                    tl.load(steps + row),
                    tl.load(positions + row),
                    VOCAB_SIZE,
                    CAP,
                    BLOCK,
                )
            tests = (share < 1) & (drawn >= limit) & (drawn < largest)  # 3.
            again = False
            if tests:
                limit = from_ordered_word(ordered_words(drawn) + 1)  # the next number
                left, heavier = _sums(raw_logits, processing, largest, least, limit, VOCAB_SIZE, CAP, BLOCK)
                again = heavier >= left * share
                tests = again
        tl.store(sampled + row, token.to(tl.int64))


@triton.jit
def _sums(
    raw_logits,
    processing,
    largest,
    least,
    limit,
    VOCAB_SIZE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of the weights of a row's processed logits from `least` on, and of those from `limit` on."""
    places = tl.arange(0, BLOCK)
    left = tl.zeros([BLOCK], tl.float32)
    heavier = tl.zeros([BLOCK], tl.float32)
    for begin in tl.range(0, VOCAB_SIZE, BLOCK, num_stages=STAGES):
        processed = processed_logits(raw_logits, processing, begin + places, VOCAB_SIZE, CAP)
        weights = tl.exp2((processed - largest) * _LOG2_E)
        left += tl.where(processed >= least, weights, 0.0)
        heavier += tl.where(processed >= limit, weights, 0.0)
    return tl.sum(left, 0), tl.sum(heavier, 0)


@triton.jit
def _draw(
    raw_logits,
    processing,
    limit,
    seed,
    canvas_index,
    step,
    position,
    VOCAB_SIZE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the tokens with processed logits from `limit` on the first with the largest sum of logit and Gumbel noise, and its
    processed logit."""
    places = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    tokens = tl.zeros([BLOCK], tl.int32)
    drawn = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in tl.range(0, VOCAB_SIZE, BLOCK, num_stages=STAGES):
        processed = processed_logits(raw_logits, processing, begin + places, VOCAB_SIZE, CAP)
        if tl.max(processed, 0) >= limit:
            words = gumbel_words(seed, canvas_index, step, position, begin, BLOCK)
            noisy = tl.where(processed >= limit, processed + gumbel_from_words(words), float("-inf"))
            better = noisy > most
            tokens = tl.where(better, begin + places, tokens)
            drawn = tl.where(better, processed, drawn)
            most = tl.where(better, noisy, most)
    token = tl.min(tl.where(most == tl.max(most, 0), tokens, VOCAB_SIZE), 0)
    return token, tl.max(tl.where(tokens == token, drawn, float("-inf")), 0)
