"""How the words of weights become the first factor of a product in Gluon, as `numbers_kernel.py` does it in Triton's language.

| KIND | words of 64 x 64 numbers | numbers of the product |
|---|---|---|
| packed | `plugins.moe.packing`, int32 | bfloat16 |
| int4 | `plugins.moe.int4`, of two halfwords each | bfloat16 |
| nvfp4 | `plugins.moe.nvfp4`, of four bytes each | bfloat16 |
| wide | e4m3 numbers, four each | float16 |

A thread loads what it multiplies: nothing passes from one to another.
"""

# ruff: noqa: N803 - constants are in capitals

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from plugins.moe.hopper_tile_kernel import GROUP_WARPS
from plugins.moe.numbers_kernel import E2M1_PAIR, LAST_E2M1_PAIR, OFFSET_OF, SCALED_PAIR, SCALES_OF, SPREAD
from plugins.moe.packing import PLANES, SIGNS, WHOLE

WIDENED = "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }"
"""Of four e4m3 numbers the first two and the last two, in float16."""

_WIDENED = gl.constexpr(WIDENED)
_PLANES, _SIGNS, _WHOLE = gl.constexpr(PLANES), gl.constexpr(SIGNS), gl.constexpr(WHOLE)
_SPREAD, _OFFSET_OF, _SCALED_PAIR = gl.constexpr(SPREAD), gl.constexpr(OFFSET_OF), gl.constexpr(SCALED_PAIR)
_SCALES_OF, _E2M1_PAIR, _LAST_E2M1_PAIR = gl.constexpr(SCALES_OF), gl.constexpr(E2M1_PAIR), gl.constexpr(LAST_E2M1_PAIR)


@gluon.jit
def words(at, KIND: gl.constexpr, BLOCK: gl.constexpr):
    """at: the words of 64 columns of a block. Returns a thread's: planes, three of packed numbers and two of FP8 ones; of those
    in 4 bits the numbers and the scales."""
    WORDS: gl.constexpr = BLOCK * BLOCK // 8
    line = gl.arange(0, WORDS, gl.BlockedLayout([4], [32], [GROUP_WARPS], [0]))
    loaded = (gl.load(at + line),)
    if KIND == "packed" or KIND == "wide":
        for plane in gl.static_range(1, _PLANES if KIND == "packed" else 2):
            loaded += (gl.load(at + plane * WORDS + line),)
    else:  # two words of scales for every lane_column: the bits 1 and 2 of a place
        place = gl.arange(0, WORDS // 2, gl.BlockedLayout([2], [32], [GROUP_WARPS], [0]))
        loaded += (gl.load(at + (WORDS + place // 8 * 2 + place % 2)),)
    return loaded


@gluon.jit
def factor_of(loaded, KIND: gl.constexpr, FACTOR: gl.constexpr):
    """[64, 64] numbers in the layout FACTOR, and their words, of two numbers each. A wait for the product names the words, so
    that numbers keep their registers: the numbers themselves, of 16 bits, would all be copied for it."""
    if KIND == "wide":
        pair = wide_pairs(loaded)
        even = (pair & 0xFFFF).to(gl.uint16).to(gl.float16, bitcast=True)
        odd = (pair >> 16).to(gl.uint16).to(gl.float16, bitcast=True)
        number = gl.join(even, odd).reshape((4, 8, 4, 2, 2, 2, 2, 2))
        # warp, lane_row, lane_column, far, next, upper, right, odd
        number = number.permute((0, 5, 1, 3, 4, 6, 2, 7)).reshape((64, 64))
    else:
        pair = packed_pairs(loaded) if KIND == "packed" else int4_pairs(loaded) if KIND == "int4" else nvfp4_pairs(loaded)
        even = (pair & 0xFFFF).to(gl.uint16).to(gl.bfloat16, bitcast=True)
        odd = (pair >> 16).to(gl.uint16).to(gl.bfloat16, bitcast=True)
        number = gl.join(even, odd).reshape((4, 8, 4, 2, 2, 2, 2, 2))
        # warp, lane_row, lane_column, upper, far, right, next, odd
        number = number.permute((0, 3, 1, 4, 6, 5, 2, 7)).reshape((64, 64))
    return gl.convert_layout(number, FACTOR, assert_trivial=True), pair


@gluon.jit
def packed_pairs(loaded):
    """Two bfloat16 numbers a word [words, right, next], as `plugins.moe.numbers_kernel.packed_numbers`."""
    first, second, third = loaded
    fourth = ((first >> 4) & 0x07800780) | ((second >> 8) & 0x00780078) | ((third >> 12) & 0x00070007) | ((third << 4) & _SIGNS)
    pair = gl.join(gl.join(first & _WHOLE, second & _WHOLE), gl.join(third & _WHOLE, fourth))
    # A pair of numbers stays in its register: seen through, its halves would be masked apart and put together again.
    return gl.inline_asm_elementwise("", "=r,0", [pair], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def int4_pairs(loaded):
    """The same, as `plugins.moe.numbers_kernel.int4_numbers`."""
    word, scales = loaded
    two: gl.constexpr = (gl.int32, gl.int32)
    near, far = gl.inline_asm_elementwise(_SPREAD, "=r,=r,r", [scales], dtype=two, is_pure=True, pack=1)
    scale = of_words(near, far, word)
    offset = gl.inline_asm_elementwise(_OFFSET_OF, "=r,r", [scale], dtype=gl.int32, is_pure=True, pack=1)
    left = gl.join(scaled_pair(word, scale, offset), scaled_pair(word >> 4, scale, offset))
    third, fourth = scaled_pair(word >> 8, scale, offset), scaled_pair(((word >> 12) & 0xFFFFF) | (word << 20), scale, offset)
    return gl.join(left, gl.join(third, fourth))


@gluon.jit
def nvfp4_pairs(loaded):
    """The same, as `plugins.moe.numbers_kernel.nvfp4_numbers`."""
    word, scales = loaded
    four: gl.constexpr = (gl.int32, gl.int32, gl.int32, gl.int32)
    near, near_next, far, far_next = gl.inline_asm_elementwise(
        _SCALES_OF, "=r,=r,=r,=r,r", [scales], dtype=four, is_pure=True, pack=1
    )
    scale, scale_next = of_words(near, far, word), of_words(near_next, far_next, word)
    first, second = e2m1_pair(word, scale, _E2M1_PAIR), e2m1_pair(word << 3, scale, _E2M1_PAIR)
    third, fourth = e2m1_pair(word << 6, scale_next, _E2M1_PAIR), e2m1_pair(word, scale_next, _LAST_E2M1_PAIR)
    return gl.join(gl.join(first, second), gl.join(third, fourth))


@gluon.jit
def of_words(near, far, word):
    """Of scales for both halves of a row's 64 columns one for each word."""
    both = gl.join(near, far).reshape((near.shape[0] * 2,))
    return gl.convert_layout(both, word.type.layout, assert_trivial=True)


@gluon.jit
def scaled_pair(word, scale, offset):
    return gl.inline_asm_elementwise(_SCALED_PAIR, "=r,r,r,r", [word, scale, offset], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def e2m1_pair(word, scale, ASSEMBLY: gl.constexpr):
    return gl.inline_asm_elementwise(ASSEMBLY, "=r,r,r", [word, scale], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def wide_pairs(planes):
    """Two float16 numbers a word [words, upper, right], as `plugins.moe.numbers_kernel.wide_numbers`."""
    two: gl.constexpr = (gl.int32, gl.int32)
    left, right = gl.inline_asm_elementwise(_WIDENED, "=r,=r,r", [planes[0]], dtype=two, is_pure=True, pack=1)
    upper_left, upper_right = gl.inline_asm_elementwise(_WIDENED, "=r,=r,r", [planes[1]], dtype=two, is_pure=True, pack=1)
    return gl.join(gl.join(left, upper_left), gl.join(right, upper_right))
