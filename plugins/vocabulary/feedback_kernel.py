"""Raw logits → the weights of a softmax over them, in place: what self-conditioning multiplies with the embedding.

    1. processed logits, see `processed_logits`, rounded to the logits' dtype, as in training and in transformers
    2. weight = exp(processed - the row's largest), rounded to the logits' dtype; a probability is weight / sum of weights.
       Where a token is given, its weight is 1 and every other 0
    3. the tile's sum of weights, before their rounding

The division is left to whoever has the product with the embedding, which is small: [rows, D] where this is [rows, V].
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.vocabulary.kernel import processed_logits, processing_of


@triton.jit
def softmax_weights_kernel(
    temperature,
    bias,
    biased,
    repeated,
    penalties,
    slots,
    largest,
    argmax,
    given,
    logits,
    totals,
    VOCAB_SIZE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (R, S). largest, argmax: [R], a row's most likely token and its raw logit. given: [R], negative where none is.
    logits: [R, V], overwritten. totals: [R, S]. CAP: 0 for none."""
    row = tl.program_id(0)
    tile = tl.program_id(1)
    num_tiles: tl.constexpr = (VOCAB_SIZE + BLOCK - 1) // BLOCK
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + row)
    logits += row.to(tl.int64) * VOCAB_SIZE
    processing = processing_of(row, slot, temperature, bias, biased, repeated, penalties, VOCAB_SIZE)
    dtype = logits.dtype.element_ty

    processed = processed_logits(logits, processing, columns, VOCAB_SIZE, CAP)  # 1.
    at_top = tl.load(argmax + row)
    # Another program may have overwritten it in place: so it comes apart.
    top = processed_logits(largest + row - at_top, processing, at_top, VOCAB_SIZE, CAP)
    weights = tl.exp(processed.to(dtype).to(tl.float32) - top.to(dtype).to(tl.float32))  # 2.
    of_request = tl.load(given + row)
    weights = tl.where(of_request < 0, weights, (columns == of_request).to(tl.float32))
    tl.store(logits + columns, weights.to(dtype), mask=columns < VOCAB_SIZE)
    tl.store(totals + row * num_tiles + tile, tl.sum(weights, 0))  # 3.
