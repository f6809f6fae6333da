"""The CUDA path of the operators of the mixture of experts: their kernels, called one by one. Compiled programs have them as
parts of the feed-forward operator; see `plugins.feed_forward.cuda`.

Import this module only where triton is installed; it needs neither a GPU nor a CUDA build of PyTorch.
"""

from torch import Tensor

from plugins.library import LIBRARY
from plugins.moe import fp8_launch, kinds, launch


def choose_experts(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Of equal logits the lower index comes first."""
    top_k_weights, top_k_index = launch.router(logits.contiguous(), per_expert_scale, top_k).run()
    return top_k_weights, top_k_index


LIBRARY.impl("experts", kinds.experts, "CUDA")
LIBRARY.impl("experts_fp8", fp8_launch.experts_fp8, "CUDA")
LIBRARY.impl("choose_experts", choose_experts, "CUDA")
