"""The weights of a layer's experts in every format that kernels take."""

from collections.abc import Sequence

import torch

from plugins.moe.formats import Format, in_format

FORMATS = (None, "packed", "int4", "wide", "narrow")
"""None: as a checkpoint has them, in bfloat16."""


def is_fp8(wanted: Format | None) -> bool:
    return wanted in ("wide", "narrow")


def arranged(experts: Sequence[torch.Tensor], wanted: Format | None) -> list[torch.Tensor]:
    """gate_up_proj and down_proj, in FP8 each followed by its scale, as the kernels take them."""
    if wanted is None:
        return list(experts)
    projections = experts[:: len(experts) // 2]
    formed = [in_format(each, wanted, halves) for each, halves in zip(projections, (2, 1), strict=True)]
    return [formed[0], experts[1], formed[1], experts[3]] if is_fp8(wanted) else formed
