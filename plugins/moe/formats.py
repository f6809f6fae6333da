"""The formats in which experts' weights are bound other than as a checkpoint has them; in all of them they are arranged.

| format | numbers | for |
|---|---|---|
| packed | bfloat16 in 12 bits, as int32 | rows in bfloat16 |
| int4 | bfloat16 rounded to 4 bits and a scale for 32, as int16 | rows in bfloat16 or float32 |
| nvfp4 | e2m1 with an e4m3 scale for 16, as uint8 | rows in bfloat16 or float32 |
| wide | e4m3 | rows in float16 or float32 |
| narrow | e4m3 | rows in e4m3 |
"""

from functools import partial
from typing import Literal

from torch import Tensor

from plugins.moe.arranging import arrange, arranged_shape
from plugins.moe.int4 import INT4_DTYPE, int4_shape, to_int4
from plugins.moe.nvfp4 import NVFP4_DTYPE, nvfp4_shape, to_nvfp4
from plugins.moe.packing import PACKED_DTYPE, pack, packed_shape

Format = Literal["packed", "int4", "nvfp4", "wide", "narrow"]

OF_BFLOAT16 = ("packed", "int4")
"""Formats that bfloat16 numbers are brought into."""

_MAKE = {
    "packed": pack,
    "int4": to_int4,
    "nvfp4": to_nvfp4,
    "wide": partial(arrange, narrow=False),
    "narrow": partial(arrange, narrow=True),
}
_SHAPE = {"packed": packed_shape, "int4": int4_shape, "nvfp4": nvfp4_shape}
_DTYPE = {"packed": PACKED_DTYPE, "int4": INT4_DTYPE, "nvfp4": NVFP4_DTYPE}


def in_format(weight: Tensor, wanted: Format, halves: int) -> Tensor:
    """A weight [E, R, C], in bfloat16 or e4m3 or the rows of `plugins.moe.nvfp4`, as the kernels take it. halves: see
    `plugins.moe.arranging`."""
    return _MAKE[wanted](weight, halves)


def shape_in_format(shape: tuple[int, int, int], wanted: Format, halves: int) -> tuple[int, int, int]:
    """What becomes of a weight of [E, R, C] numbers."""
    return _SHAPE.get(wanted, arranged_shape)(shape, halves)


def dtype_in_format(wanted: Format) -> str:
    """PyTorch's name for it."""
    return _DTYPE.get(wanted, "float8_e4m3fn")
