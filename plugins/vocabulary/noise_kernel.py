"""Counter-based noise inside kernels: Philox 4x32-10 with the project's counter layout.

key      the seed's low and high 32 bits
counter  token lane // 4 · position in the canvas · step · stream << 30 | canvas index
output   word i: token lane 4 * (lane // 4) + i
stream   1 renoise, 2 Gumbel
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

_STREAM_RENOISE = tl.constexpr(1 << 30)
_STREAM_GUMBEL = tl.constexpr(2 << 30)


@triton.jit
def renoise_words(seed, canvas_index, step, positions):
    """The random words that become the renoised tokens of `positions`, a block. The others: scalars, int64. → uint32."""
    counter = tl.zeros_like(positions).to(tl.uint32)
    word, _, _, _ = tl.philox(
        seed,
        counter,
        positions.to(tl.uint32),
        counter + step.to(tl.uint32),
        counter + (canvas_index | _STREAM_RENOISE).to(tl.uint32),
    )
    return word


@triton.jit
def gumbel_words(seed, canvas_index, step, position, first_lane, BLOCK: tl.constexpr):
    """The random words of BLOCK token lanes from first_lane on, a multiple of 4. All scalars, int64. → [BLOCK] uint32."""
    lane_groups = (first_lane // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    counter = tl.zeros_like(lane_groups)
    word_0, word_1, word_2, word_3 = tl.philox(
        seed,
        lane_groups,
        counter + position.to(tl.uint32),
        counter + step.to(tl.uint32),
        counter + (canvas_index | _STREAM_GUMBEL).to(tl.uint32),
    )
    # `join` adds a last axis of two: this nesting puts the four words of a group next to each other, in order.
    return tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)).reshape([BLOCK])


@triton.jit
def gumbel_from_words(words):
    """-log(-log(1 - v)) with v = min((word + 1/2) * 2^-32, 1 - 2^-24), float32.

    The inner logarithm is log1p(-v), made from log: with u = 1 - v rounded, log(u) * v / (1 - u) undoes that rounding, and
    where u = 1 it is -v. Where u is not 1 it is at most 1 - 2^-24: the maximum only keeps the unused branch finite.
    """
    v = tl.minimum((words.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    u = 1.0 - v
    minus_log = tl.where(u == 1.0, v, -tl.log(u) * (v / tl.maximum(1.0 - u, 2.0**-24)))
    return -tl.log(minus_log)


@triton.jit
def least_arrival(words):
    """At most exp(-Gumbel) = -log(1 - v), without a logarithm: the first terms of its series."""
    v = words.to(tl.float32) * 2.0**-32
    return v * (1.0 + v * (0.5 + v * (1 / 3)))
