"""The definition of the experts operator with FP8 weights: one row and one expert at a time, in float32.

Rounded are the two things that a kernel stores: the activated row, to the dtype of `hidden`, and with `fp8_rows` what each
product reads, to FP8 with a scale of its own.
"""

import torch
from torch import Tensor
from torch.nn.functional import gelu

from plugins.moe.fp8 import from_fp8, to_fp8


def experts_fp8_reference(
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
    output = torch.zeros(hidden.shape, dtype=torch.float32)
    for row in range(hidden.shape[0]):
        read = as_read(hidden[row], fp8_rows)
        for expert, weight in zip(top_k_index[row].tolist(), top_k_weights[row], strict=True):
            gate, up = (from_fp8(gate_up_proj[expert], gate_up_proj_scale[expert]) @ read).chunk(2)
            activated = (gelu(gate, approximate="tanh") * up).to(hidden.dtype)
            output[row] += weight * (from_fp8(down_proj[expert], down_proj_scale[expert]) @ as_read(activated, fp8_rows))
    return output.to(hidden.dtype)


def as_read(row: Tensor, fp8_rows: bool) -> Tensor:
    """What a product reads of a row, in float32."""
    return from_fp8(*to_fp8(row)) if fp8_rows else row.float()
