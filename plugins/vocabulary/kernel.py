"""The sampler's pass over the vocabulary: logits → argmax, Gumbel argmax and entropy of each row, in one read.

    vocabulary_tile_kernel    a tile of a row's vocabulary each, block by block
        1. processed logits, see `processed_logits`
        2. the tile's largest processed logit and where it is
        3. sums over the tile of w and of w * shifted, with shifted = processed - largest, w = exp(shifted)
        4. the largest of processed + Gumbel noise and where it is (rows that are greedy: the same as 2)
    vocabulary_merge_kernel   a row each: the tiles' maxima and sums into the row's
        entropy = log(Z) - sum(w * shifted) / Z; both terms are at least 0, so nothing cancels where it is small
        logprob = -log(Z), because shifted is 0 there

4 takes logarithms only where a token can win. The Gumbel noise of a word is -log(e), so the winner has the smallest e / w; a
bound, a little less than e, comes without a logarithm. A block whose smallest bound / w is above the best so far is done with.
Of another the token with the smallest is evaluated, and only if a second one's is below that, all are. The comparisons have a
slack above the roundings of either side: what is stored is what evaluating every token gives.

Of equal values the first wins, within a tile and between tiles. Arguments: the package's, and between the two kernels

    numbers   [4, R, S] float32   largest, sum of w, sum of w * shifted, largest of processed + noise
    tokens    [2, R, S] int32     where the largest is; where the largest with noise is
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.vocabulary.noise_kernel import gumbel_from_words, gumbel_words, least_arrival

# Stands for -infinity, the logit of a forbidden token, where its product with a weight of 0 must be 0.
_LOWEST = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(1.4426950408889634)
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
_TWICE_LOG2_E = tl.constexpr(2.8853900817779268)
# Of log(e / w): relative roundings of e, w and of the noisy values, whose size is that of the largest logit.
_SLACK = tl.constexpr(2.0**-10)
_SLACK_RATIO = tl.constexpr(2.0**-21)


@triton.jit(do_not_specialize=("num_rows",))
def vocabulary_tile_kernel(
    raw_logits,
    temperature,
    bias,
    biased,
    repeated,
    penalties,
    slots,
    greedy,
    seeds,
    canvas_indices,
    steps,
    positions,
    num_rows,
    numbers,
    tokens,
    VOCAB_SIZE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Grid: (R, S). CAP: 0 for none. A tile is BLOCKS blocks of BLOCK columns."""
    row = tl.program_id(0)
    tile = tl.program_id(1)
    num_tiles: tl.constexpr = (VOCAB_SIZE + BLOCK * BLOCKS - 1) // (BLOCK * BLOCKS)
    places = tl.arange(0, BLOCK)
    slot = tl.load(slots + row)
    raw_logits += row.to(tl.int64) * VOCAB_SIZE
    processing = processing_of(row, slot, temperature, bias, biased, repeated, penalties, VOCAB_SIZE)
    random = tl.load(greedy + row) == 0
    seed = tl.load(seeds + row)
    canvas_index = tl.load(canvas_indices + row)
    step = tl.load(steps + row)
    position = tl.load(positions + row)

    largest = float("-inf")
    argmax = tile * (BLOCK * BLOCKS)
    noisy = float("-inf")
    sampled = argmax
    totals = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for begin in range(tile * (BLOCK * BLOCKS), tl.minimum((tile + 1) * (BLOCK * BLOCKS), VOCAB_SIZE), BLOCK):
        processed = processed_logits(raw_logits, processing, begin + places, VOCAB_SIZE, CAP)  # 1.

        top = tl.max(processed, 0)  # 2.
        if top > largest:
            shift = tl.maximum(largest - top, _LOWEST)
            scale = tl.exp(shift)
            weighted = (weighted + shift * totals) * scale
            totals *= scale
            argmax = begin + tl.min(tl.where(processed == top, places, BLOCK), 0)
            largest = top

        # Where every token so far is forbidden, nothing has a weight; where one is, its term is 0, the limit of w * log w.
        shifted = processed - tl.maximum(largest, _LOWEST)  # 3.
        weights = tl.exp2(shifted * _LOG2_E)
        totals += weights
        weighted += weights * tl.maximum(shifted, _LOWEST)

        if random:  # 4.
            words = gumbel_words(seed, canvas_index, step, position, begin, BLOCK)
            least = least_arrival(words) * tl.exp2(shifted * _MINUS_LOG2_E)
            slack = _SLACK + _SLACK_RATIO * tl.abs(largest)
            first = tl.min(least, 0)
            if first <= tl.exp(largest - noisy + slack):
                chosen = least == first
                gumbel = gumbel_from_words(tl.sum(tl.where(chosen, words, 0), 0))
                value = tl.sum(tl.where(chosen, processed, 0.0), 0) + gumbel
                place = tl.sum(tl.where(chosen, places, 0), 0)
                if tl.sum((least <= tl.maximum(tl.exp(largest - value + slack), first)).to(tl.int32), 0) > 1:
                    value, place = tl.max(processed + gumbel_from_words(words), 0, return_indices=True)
                if value > noisy:
                    noisy = value
                    sampled = begin + place
    if random == 0:
        noisy = largest
        sampled = argmax

    entry = row * num_tiles + tile
    plane = num_rows * num_tiles
    tl.store(numbers + entry, largest)
    tl.store(numbers + plane + entry, tl.sum(totals, 0))
    tl.store(numbers + 2 * plane + entry, tl.sum(weighted, 0))
    tl.store(numbers + 3 * plane + entry, noisy)
    tl.store(tokens + entry, argmax)
    tl.store(tokens + plane + entry, sampled)


@triton.jit(do_not_specialize=("num_rows",))
def vocabulary_merge_kernel(
    numbers, tokens, num_rows, argmax, sampled, entropy, logprob, NUM_TILES: tl.constexpr, BLOCK_TILES: tl.constexpr
):
    """Grid: (R,). BLOCK_TILES: NUM_TILES rounded up to a power of two."""
    row = tl.program_id(0)
    tiles = tl.arange(0, BLOCK_TILES)
    valid = tiles < NUM_TILES
    entries = row * NUM_TILES + tiles
    plane = num_rows * NUM_TILES
    maxima = tl.load(numbers + entries, mask=valid, other=float("-inf"))
    totals = tl.load(numbers + plane + entries, mask=valid, other=0.0)
    weighted = tl.load(numbers + 2 * plane + entries, mask=valid, other=0.0)
    noisy = tl.load(numbers + 3 * plane + entries, mask=valid, other=float("-inf"))

    largest, first = tl.max(maxima, 0, return_indices=True)
    tl.store(argmax + row, tl.load(tokens + row * NUM_TILES + first).to(tl.int64))
    _, first_noisy = tl.max(noisy, 0, return_indices=True)
    tl.store(sampled + row, tl.load(tokens + plane + row * NUM_TILES + first_noisy).to(tl.int64))

    # A tile's own sums are relative to its own maximum: move them to the row's.
    shift = tl.maximum(maxima - largest, _LOWEST)
    scale = tl.exp(shift)
    total = tl.sum(totals * scale, 0)
    mean = tl.sum((weighted + shift * totals) * scale, 0) / total
    tl.store(entropy + row, tl.log(total) - mean)
    tl.store(logprob + row, -tl.log(total))


@triton.jit
def processing_of(row, slot, temperature, bias, biased, repeated, penalties, VOCAB_SIZE: tl.constexpr):
    """What `processed_logits` takes of a row in a slot: its bias and whether it has one, its repeated tokens, their penalty and
    its inverse, the inverse of the temperature."""
    penalty = tl.load(penalties + slot)
    inverse = tl.div_rn(1.0, tl.load(temperature + row))
    has_bias = tl.load(biased + slot) != 0
    repeated += slot * ((VOCAB_SIZE + 31) // 32)
    return bias + slot * VOCAB_SIZE, has_bias, repeated, penalty, tl.div_rn(1.0, penalty), inverse


@triton.jit
def processed_logits(raw_logits, processing, columns, VOCAB_SIZE: tl.constexpr, CAP: tl.constexpr):
    """A row's logits at `columns`, float32: soft cap, penalty of repeated tokens, bias, temperature; -infinity beyond the
    vocabulary.

    raw_logits: the row's. processing: of `processing_of`; repeated tokens are read if there is a penalty, biases if there are
    any. CAP: 0 for none.
    """
    bias, has_bias, repeated, penalty, inverse_penalty, inverse = processing
    valid = columns < VOCAB_SIZE
    logits = tl.load(raw_logits + columns, mask=valid, other=0.0).to(tl.float32)
    if CAP > 0:
        logits = CAP * _tanh(logits * (1 / CAP))
    if has_bias | (penalty != 1):  # rows that have neither take one branch
        if penalty != 1:
            again = (tl.load(repeated + columns // 32, mask=valid, other=0) >> columns % 32) & 1 != 0
            logits = tl.where(again, logits * tl.where(logits > 0, inverse_penalty, penalty), logits)
        if has_bias:
            logits += tl.load(bias + columns, mask=valid, other=0.0)
    return tl.where(valid, logits * inverse, float("-inf"))


@triton.jit
def _tanh(x):
    """To two roundings. Small arguments by an odd polynomial, fitted at the Chebyshev nodes of [0, 0.625] to 1.5 * 2^-24."""
    square = x * x
    series = -0.006104945670813322 * square + 0.021003639325499535
    series = series * square - 0.05385249853134155
    series = series * square + 0.13332782685756683
    series = series * square - 0.333333283662796
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * _TWICE_LOG2_E) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * (square * series), tl.where(x < 0, -large, large))
