"""The CPU path of the experts operator with FP8 weights: as the one of other weights, in float32.

It shows what FP8 does to a checkpoint's answers. Quicker it is not: a CPU has no FP8, so that every expert's numbers are
converted whenever they are read.
"""

import torch
from torch import Tensor

from plugins.moe.cpu import by_expert, gated
from plugins.moe.fp8 import from_fp8, to_fp8


def experts_fp8_cpu(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_proj_scale: Tensor,
    down_proj: Tensor,
    down_proj_scale: Tensor,
    fp8_rows: bool,
) -> Tensor:
    """See the package's docstring."""

    def mlp(expert: int, rows: Tensor) -> Tensor:
        first = from_fp8(gate_up_proj[expert], gate_up_proj_scale[expert])
        activated = gated(torch.mm(rows, first.t())).to(hidden.dtype)
        second = from_fp8(down_proj[expert], down_proj_scale[expert])
        return torch.mm(_as_read(activated, fp8_rows), second.t())

    read = _as_read(hidden, fp8_rows)
    return by_expert(mlp, read, top_k_index, top_k_weights, gate_up_proj.shape[0]).to(hidden.dtype)


def _as_read(rows: Tensor, fp8_rows: bool) -> Tensor:
    """What a product reads, in float32."""
    return from_fp8(*to_fp8(rows)) if fp8_rows else rows.float()
