"""The weights of a layer's experts in every format that kernels take."""

from collections.abc import Sequence

import torch
from nvfp4_weights import rounded_rows

from plugins.moe.formats import Format, dtype_in_format, in_format, shape_in_format
from plugins.moe.int4 import from_int4, to_int4
from plugins.moe.nvfp4 import numbers_of

FORMATS = (None, "packed", "int4", "nvfp4", "wide", "narrow")
"""None: as a checkpoint has them, in bfloat16."""

NVFP4_FACTOR = 2.0**-9
"""Of NVFP4 weights that are made of bfloat16 ones here: a power of two, so that what they stand for is bfloat16 numbers."""


def is_fp8(wanted: Format | None) -> bool:
    return wanted in ("wide", "narrow")


def arranged(experts: Sequence[torch.Tensor], wanted: Format | None) -> list[torch.Tensor]:
    """gate_up_proj and down_proj, in FP8 each followed by its scale, as the kernels take them."""
    if wanted is None:
        return list(experts)
    projections = experts[:: len(experts) // 2]
    if wanted == "nvfp4":
        projections = [rounded_rows(each, factor=NVFP4_FACTOR) for each in projections]
    formed = [in_format(each, wanted, halves) for each, halves in zip(projections, (2, 1), strict=True)]
    return [formed[0], experts[1], formed[1], experts[3]] if is_fp8(wanted) else formed


def arranged_empty(experts: Sequence[torch.Tensor], wanted: Format | None) -> list[torch.Tensor]:
    """Tensors as those of `arranged`, with anything in them."""
    if wanted is None:
        return list(experts)
    dtype, formed = getattr(torch, dtype_in_format(wanted)), list(experts)
    for place, halves in zip(range(0, len(experts), len(experts) // 2), (2, 1), strict=True):
        formed[place] = experts[place].new_empty(shape_in_format(experts[place].shape, wanted, halves), dtype=dtype)
    return formed


def representable(experts: Sequence[torch.Tensor], wanted: Format | None) -> list[torch.Tensor]:
    """The bfloat16 numbers that gate_up_proj and down_proj stand for in a format of 4 bits; in others they stay as they are."""
    if wanted == "int4":
        return [from_int4(to_int4(each), *each.shape[1:]) for each in experts]
    if wanted == "nvfp4":
        return [numbers_of(rounded_rows(each, factor=NVFP4_FACTOR))[0].bfloat16() * NVFP4_FACTOR for each in experts]
    return list(experts)
