"""`diffusiongemma::experts_fp8`, the mixture of experts with FP8 weights as programs call it (see the package's docstring)."""

import torch

from plugins.library import LIBRARY
from plugins.moe.fp8_cpu import experts_fp8_cpu

LIBRARY.define(
    "experts_fp8(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor gate_up_proj_scale, "
    "Tensor down_proj, Tensor down_proj_scale, bool fp8_rows) -> Tensor"
)
LIBRARY.impl("experts_fp8", experts_fp8_cpu, "CPU")


@torch.library.register_fake("diffusiongemma::experts_fp8", lib=LIBRARY)
def _(hidden, top_k_index, top_k_weights, gate_up_proj, gate_up_proj_scale, down_proj, down_proj_scale, fp8_rows):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


experts_fp8 = torch.ops.diffusiongemma.experts_fp8.default
