"""The formats in which experts' weights are bound other than as a checkpoint has them; in all of them they are arranged.

| format | numbers | for |
|---|---|---|
| packed | bfloat16 in 12 bits, as int32 | rows in bfloat16 |
| wide | e4m3 | rows in float16 or float32 |
| narrow | e4m3 | rows in e4m3 |
"""

from typing import Literal

from torch import Tensor

from plugins.moe.arranging import arrange, arranged_shape
from plugins.moe.packing import PACKED_DTYPE, pack, packed_shape

Format = Literal["packed", "wide", "narrow"]


def in_format(weight: Tensor, wanted: Format, halves: int) -> Tensor:
    """[E, R, C], in bfloat16 or e4m3, as the kernels take it. halves: see `plugins.moe.arranging`."""
    return pack(weight, halves) if wanted == "packed" else arrange(weight, halves, narrow=wanted == "narrow")


def shape_in_format(shape: tuple[int, int, int], wanted: Format, halves: int) -> tuple[int, int, int]:
    """What becomes of the shape [E, R, C]."""
    return packed_shape(shape, halves) if wanted == "packed" else arranged_shape(shape, halves)


def dtype_in_format(wanted: Format) -> str:
    """PyTorch's name for it."""
    return PACKED_DTYPE if wanted == "packed" else "float8_e4m3fn"
