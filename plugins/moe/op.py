"""`diffusiongemma::experts`, the mixture-of-experts operator as programs call it (see the package's docstring)."""

import torch

from plugins.library import LIBRARY
from plugins.moe.cpu import experts_cpu

LIBRARY.define(
    "experts(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj) -> Tensor"
)
LIBRARY.impl("experts", experts_cpu, "CPU")


@torch.library.register_fake("diffusiongemma::experts", lib=LIBRARY)
def _(hidden, top_k_index, top_k_weights, gate_up_proj, down_proj):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


experts = torch.ops.diffusiongemma.experts.default

if torch.version.cuda:  # CPU builds of PyTorch come without triton, and have no use for it
    from plugins.moe import cuda  # noqa: F401
