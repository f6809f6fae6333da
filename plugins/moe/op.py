"""The operators of the mixture of experts as programs call them (see the package's docstring)."""

import torch

from plugins.library import LIBRARY
from plugins.moe.cpu import experts_cpu as experts_eager
from plugins.moe.fp8_op import experts_fp8
from plugins.moe.reference import choose_experts_reference

__all__ = ["choose_experts", "experts", "experts_cpu", "experts_fp8"]

_SCHEMA = "(Tensor hidden, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj) -> Tensor"
LIBRARY.define(f"experts{_SCHEMA}")
LIBRARY.impl("experts", experts_eager, "CPU")
LIBRARY.define(f"experts_cpu{_SCHEMA}")  # in C++, float32; see `plugins.cpu`
LIBRARY.define("choose_experts(Tensor logits, Tensor per_expert_scale, int top_k) -> (Tensor, Tensor)")
LIBRARY.impl("choose_experts", choose_experts_reference, "CPU")


@torch.library.register_fake("diffusiongemma::experts", lib=LIBRARY)
@torch.library.register_fake("diffusiongemma::experts_cpu", lib=LIBRARY)
def _(hidden, top_k_index, top_k_weights, gate_up_proj, down_proj):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.register_fake("diffusiongemma::choose_experts", lib=LIBRARY)
def _(logits, per_expert_scale, top_k):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


experts = torch.ops.diffusiongemma.experts.default
experts_cpu = torch.ops.diffusiongemma.experts_cpu.default
choose_experts = torch.ops.diffusiongemma.choose_experts.default

PLAIN_DECOMPOSITIONS = {choose_experts: choose_experts_reference}
"""The operators that a compiler for the CPU, or TensorRT, does as well from their definition."""

if torch.version.cuda:  # CPU builds of PyTorch come without triton, and have no use for it
    from plugins.moe import cuda  # noqa: F401
