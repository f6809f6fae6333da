"""What follows the vocabulary pass, one program a canvas: acceptance, renoising, convergence.

    1. Accept the longest run of lowest-entropy tokens with sum(entropies) - max(entropies) <= bound.
    2. Accepted tokens stay; the others become random.
    3. Converged: stable (the argmax canvas has repeated itself for `stability_threshold` steps) and confident (mean entropy
       below its threshold).

1 needs no sort. A token's place in the order is known from comparing it with each other token: those before it are those of
lower entropy, and those of equal entropy to its left (a stable sort's order). The sum up to it is over these and itself, taken
in float64 and rounded once, so that it does not depend on the order of the additions.
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.vocabulary.noise_kernel import renoise_words


@triton.jit
def acceptance_kernel(
    entropy,
    argmax,
    sampled,
    bound,
    confidence_threshold,
    previous_argmax,
    stable_steps,
    stability_threshold,
    seeds,
    canvas_indices,
    steps,
    canvas,
    new_stable_steps,
    converged,
    VOCAB_SIZE: tl.constexpr,
    CANVAS_LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """Grid: (B,). BLOCK: CANVAS_LENGTH rounded up to a power of two; BLOCK_OTHERS: a part of it, compared at a time."""
    row = tl.program_id(0)
    entropy += row * CANVAS_LENGTH
    positions = tl.arange(0, BLOCK)
    valid = positions < CANVAS_LENGTH
    own = tl.load(entropy + positions, mask=valid, other=0.0)

    before = tl.zeros([BLOCK], tl.float64)  # 1.
    for first in range(0, CANVAS_LENGTH, BLOCK_OTHERS):
        others = first + tl.arange(0, BLOCK_OTHERS)
        other = tl.load(entropy + others, mask=others < CANVAS_LENGTH, other=float("inf"))
        earlier = (other[None, :] == own[:, None]) & (others[None, :] < positions[:, None])
        counts = (other[None, :] < own[:, None]) | earlier
        before += tl.sum(tl.where(counts, other[None, :], 0.0).to(tl.float64), 1)
    accepted = (before + own.to(tl.float64)).to(tl.float32) - own <= tl.load(bound + row)

    cells = row * CANVAS_LENGTH + positions  # 2.
    words = renoise_words(tl.load(seeds + row), tl.load(canvas_indices + row), tl.load(steps + row), positions)
    random = ((words.to(tl.uint64) * VOCAB_SIZE) >> 32).to(tl.int64)
    tl.store(canvas + cells, tl.where(accepted, tl.load(sampled + cells, mask=valid, other=0), random), mask=valid)

    now = tl.load(argmax + cells, mask=valid, other=0)  # 3.
    changed = tl.sum((now != tl.load(previous_argmax + cells, mask=valid, other=0)).to(tl.int32), 0)
    repeats = tl.where(changed == 0, tl.load(stable_steps + row) + 1, 0)
    mean = (tl.sum(own.to(tl.float64), 0) / CANVAS_LENGTH).to(tl.float32)
    confident = mean < tl.load(confidence_threshold + row)
    tl.store(new_stable_steps + row, repeats)
    tl.store(converged + row, (repeats >= tl.load(stability_threshold + row)) & confident)
