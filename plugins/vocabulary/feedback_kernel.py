"""Raw logits → the weights of a softmax over them, in place: what self-conditioning multiplies with the embedding.

    1. processed = soft_cap(raw logits) / temperature, rounded to the logits' dtype, as in training and in transformers
    2. weight = exp(processed - the row's largest), rounded to the logits' dtype; a probability is weight / sum of weights
    3. the tile's sum of weights, before their rounding

The division is left to whoever has the product with the embedding, which is small: [rows, D] where this is [rows, V].
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.vocabulary.kernel import _tanh


@triton.jit
def softmax_weights_kernel(
    temperature, largest, logits, totals, VOCAB_SIZE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: (R, S). largest: [R], a row's largest raw logit. logits: [R, V], overwritten. totals: [R, S]. CAP: 0 for none."""
    row = tl.program_id(0)
    tile = tl.program_id(1)
    num_tiles: tl.constexpr = (VOCAB_SIZE + BLOCK - 1) // BLOCK
    lanes = tile * BLOCK + tl.arange(0, BLOCK)
    valid = lanes < VOCAB_SIZE
    at = logits + row.to(tl.int64) * VOCAB_SIZE + lanes
    dtype = logits.dtype.element_ty
    inverse = tl.div_rn(1.0, tl.load(temperature + row))

    capped = tl.load(at, mask=valid, other=0.0).to(tl.float32)  # 1.
    top = tl.load(largest + row).to(tl.float32)
    if CAP > 0:
        capped = CAP * _tanh(capped * (1 / CAP))
        top = CAP * _tanh(top * (1 / CAP))
    processed = (capped * inverse).to(dtype).to(tl.float32)
    weights = tl.exp(processed - (top * inverse).to(dtype).to(tl.float32))  # 2.
    weights = tl.where(valid, weights, 0.0)
    tl.store(at, weights.to(dtype), mask=valid)
    tl.store(totals + row * num_tiles + tile, tl.sum(weights, 0))  # 3.
