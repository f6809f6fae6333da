"""How the numbers of arranged weights come from memory into the registers of a product's first factor, a function a format.

`plugins.moe.arranging` has the order, `plugins.moe.packing`, `plugins.moe.int4` and `plugins.moe.nvfp4` the formats that are
unpacked.
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl

from plugins.moe.int4 import HALFWORDS, WORDS
from plugins.moe.nvfp4 import BYTES
from plugins.moe.packing import SIGNS, WHOLE

_SIGNS, _WHOLE = tl.constexpr(SIGNS), tl.constexpr(WHOLE)
_WORDS, _HALFWORDS, _BYTES = tl.constexpr(WORDS), tl.constexpr(HALFWORDS), tl.constexpr(BYTES)

# In one line each: PyTorch's compiler copies a kernel's constants into a string of its own, where line breaks would end them.
SPREAD = "prmt.b32 $0, $2, $2, 0x1010; prmt.b32 $1, $2, $2, 0x3232;"
"""The lower and the upper half of a word, each twice."""

OFFSET_OF = "{ .reg .b32 a, z; mov.b32 a, 0xC1C0C1C0; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, a, z; }"
"""-24 times two bfloat16 numbers."""

SCALED_PAIR = (
    "{ .reg .b32 m, b, p; mov.b32 m, 0x00780078; mov.b32 b, 0x41804180; "
    "lop3.b32 p, $1, m, b, 0xEA; fma.rn.bf16x2 $0, p, $2, $3; }"
)
"""The numbers at bits 3 to 6 of both halves of a word, as the last bits of bfloat16 numbers from 16 on, times two scales, plus
two offsets. What instructions of the language become takes half as many again."""

SCALES_OF = (
    "{ .reg .b32 a, b, c, d; prmt.b32 a, $4, 0, 0x4040; prmt.b32 b, $4, 0, 0x4141; prmt.b32 c, $4, 0, 0x4242; "
    "prmt.b32 d, $4, 0, 0x4343; mad.lo.u32 $0, a, 16, 0x70007000; mad.lo.u32 $1, b, 16, 0x70007000; "
    "mad.lo.u32 $2, c, 16, 0x70007000; mad.lo.u32 $3, d, 16, 0x70007000; }"
)
"""Each byte of a word as the middle bits of a bfloat16 number whose first are 0111, twice."""

E2M1_PAIR = "{ .reg .b32 p, z; mov.b32 z, 0x80008000; and.b32 p, $1, 0x81C081C0; fma.rn.bf16x2 $0, p, $2, z; }"
"""The numbers at the bits 15, 8, 7 and 6 of both halves of a word, as bfloat16 numbers, times two scales. A product alone would
need compute capability 9.0; -0 added to it changes nothing."""

LAST_E2M1_PAIR = (
    "{ .reg .b32 a, b, c, z; mov.b32 z, 0x80008000; shl.b32 a, $1, 1; shr.u32 b, $1, 4; shr.u32 c, $1, 5; and.b32 a, a, z; "
    "lop3.b32 a, b, 0x00C000C0, a, 0xEA; lop3.b32 a, c, 0x01000100, a, 0xEA; fma.rn.bf16x2 $0, a, $2, z; }"
)
"""The same of the bits 14, 13, 11 and 10, which are not side by side."""

_SPREAD, _OFFSET_OF, _SCALED_PAIR = tl.constexpr(SPREAD), tl.constexpr(OFFSET_OF), tl.constexpr(SCALED_PAIR)
_SCALES_OF, _E2M1_PAIR, _LAST_E2M1_PAIR = tl.constexpr(SCALES_OF), tl.constexpr(E2M1_PAIR), tl.constexpr(LAST_E2M1_PAIR)


@triton.jit
def items_of(dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Elements of memory that 64 x 64 numbers take, in a product of numbers wider than FP8."""
    PACKED: tl.constexpr = BLOCK * BLOCK * 3 // 8
    FOUR_BITS: tl.constexpr = _BYTES if dtype == tl.uint8 else _HALFWORDS
    return PACKED if dtype == tl.int32 else FOUR_BITS if dtype == tl.uint8 or dtype == tl.int16 else BLOCK * BLOCK


@triton.jit
def packed_numbers(at, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """at: pointers [BLOCKS, 1] to the words of 64 x 64 packed numbers. Returns [BLOCKS * 64, 64] bfloat16, 2^base times too
    small."""
    GROUPS: tl.constexpr = BLOCK * BLOCK // 8
    at += tl.arange(0, GROUPS)[None, :]
    first, second, third = tl.load(at), tl.load(at + GROUPS), tl.load(at + 2 * GROUPS)
    fourth = ((first >> 4) & 0x07800780) | ((second >> 8) & 0x00780078) | ((third >> 12) & 0x00070007) | ((third << 4) & _SIGNS)
    left = tl.join(first & _WHOLE, second & _WHOLE)
    pair = tl.join(left, tl.join(third & _WHOLE, fourth))  # [BLOCKS, GROUPS, right, next]
    return _numbers_of(pair, BLOCKS, BLOCK)


@triton.jit
def int4_numbers(at, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """at: pointers [BLOCKS, 1] to the halfwords of 64 x 64 numbers in 4 bits. Returns [BLOCKS * 64, 64] bfloat16."""
    at = at.to(tl.pointer_type(tl.int32), bitcast=True)
    word = tl.load(at + tl.arange(0, _WORDS)[None, :]).to(tl.uint32, bitcast=True)
    # Two scales a load, those of far 0 and 1, for every lane_column: the bits 1 and 2 of a place here, 2 and 3 of a word's.
    place = tl.arange(0, _WORDS // 2)[None, :]
    scales = tl.load(at + (_WORDS + place // 8 * 2 + place % 2))
    near, far = tl.inline_asm_elementwise(_SPREAD, "=r,=r,r", [scales], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1)
    scale = tl.reshape(tl.join(near, far), (BLOCKS, _WORDS))
    offset = tl.inline_asm_elementwise(_OFFSET_OF, "=r,r", [scale], dtype=tl.uint32, is_pure=True, pack=1)
    left = tl.join(_scaled_pair(word, scale, offset), _scaled_pair(word >> 4, scale, offset))
    third, fourth = _scaled_pair(word >> 8, scale, offset), _scaled_pair((word >> 12) | (word << 20), scale, offset)
    pair = tl.join(left, tl.join(third, fourth))  # [BLOCKS, WORDS, right, next]
    return _numbers_of(pair, BLOCKS, BLOCK)


@triton.jit
def nvfp4_numbers(at, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """at: pointers [BLOCKS, 1] to the bytes of 64 x 64 NVFP4 numbers. Returns [BLOCKS * 64, 64] bfloat16, 2^7 times too
    small."""
    at = at.to(tl.pointer_type(tl.int32), bitcast=True)
    word = tl.load(at + tl.arange(0, _WORDS)[None, :]).to(tl.uint32, bitcast=True)
    # Four scales a load, those of far and next, for every lane_column: the bits 1 and 2 of a place, as above.
    place = tl.arange(0, _WORDS // 2)[None, :]
    scales = tl.load(at + (_WORDS + place // 8 * 2 + place % 2))
    four: tl.constexpr = (tl.uint32, tl.uint32, tl.uint32, tl.uint32)
    near, near_next, far, far_next = tl.inline_asm_elementwise(
        _SCALES_OF, "=r,=r,=r,=r,r", [scales], dtype=four, is_pure=True, pack=1
    )
    scale = tl.reshape(tl.join(near, far), (BLOCKS, _WORDS))
    scale_next = tl.reshape(tl.join(near_next, far_next), (BLOCKS, _WORDS))
    first, second = _e2m1_pair(word, scale, _E2M1_PAIR), _e2m1_pair(word << 3, scale, _E2M1_PAIR)
    third, fourth = _e2m1_pair(word << 6, scale_next, _E2M1_PAIR), _e2m1_pair(word, scale_next, _LAST_E2M1_PAIR)
    pair = tl.join(tl.join(first, second), tl.join(third, fourth))  # [BLOCKS, WORDS, right, next]
    return _numbers_of(pair, BLOCKS, BLOCK)


@triton.jit
def _e2m1_pair(word, scale, ASSEMBLY: tl.constexpr):
    return tl.inline_asm_elementwise(ASSEMBLY, "=r,r,r", [word, scale], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def _numbers_of(pair, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Of words [BLOCKS, words, right, next] with two bfloat16 numbers each: [BLOCKS * 64, 64]."""
    even = (pair & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    odd = (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    number = tl.reshape(tl.join(even, odd), (BLOCKS, 4, 8, 4, 2, 2, 2, 2, 2))
    # block, warp, lane_row, lane_column, upper, far, right, next, odd
    number = tl.permute(number, (0, 1, 4, 2, 5, 7, 6, 3, 8))
    return tl.reshape(number, (BLOCKS * BLOCK, BLOCK))


@triton.jit
def _scaled_pair(word, scale, offset):
    operands = [word, scale, offset]
    return tl.inline_asm_elementwise(_SCALED_PAIR, "=r,r,r,r", operands, dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def wide_numbers(at, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """at: pointers [BLOCKS, 1] to 64 x 64 FP8 numbers, for a product of wider ones. Returns [BLOCKS * 64, 64] as they are."""
    number = tl.load(at + tl.arange(0, BLOCK * BLOCK)[None, :])
    # block, upper, warp, lane_row, lane_column, far, next, right, odd
    number = tl.reshape(number, (BLOCKS, 2, 4, 8, 4, 2, 2, 2, 2))
    number = tl.permute(number, (0, 2, 1, 3, 5, 6, 7, 4, 8))
    return tl.reshape(number, (BLOCKS * BLOCK, BLOCK))


@triton.jit
def narrow_numbers(at, start, TILE_DEPTH: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """at: pointer to a block of FP8 numbers, for a product of such; start: how many of them come before. Returns
    [64, TILE_DEPTH], zeros beyond the block's end."""
    STEP: tl.constexpr = TILE_DEPTH * BLOCK
    items = start + tl.arange(0, STEP)
    number = tl.load(at + items) if STRIDE % STEP == 0 else tl.load(at + items, mask=items < STRIDE, other=0.0)
    # 64 columns, upper, warp, lane_row, lane_column, far, right, byte
    number = tl.reshape(number, (TILE_DEPTH // BLOCK, 2, 4, 8, 4, 2, 2, 4))
    number = tl.permute(number, (2, 1, 3, 0, 5, 6, 4, 7))
    return tl.reshape(number, (BLOCK, TILE_DEPTH))
