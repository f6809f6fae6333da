"""The CUDA path of the heads operator; see `plugins.attention.cuda` for how compilers come to see it."""

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from plugins.heads.launch import normed_heads
from plugins.library import LIBRARY


@triton_op("diffusiongemma::normed_heads_triton", mutates_args={})
def normed_heads_triton(
    heads: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, has_values: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """As `normed_heads`, open to compilers."""
    return normed_heads(heads, q_norm, k_norm, cos, sin, num_kv_heads, has_values, eps, wrap=wrap_triton)


LIBRARY.impl("normed_heads", normed_heads, "CUDA")

CUDA_DECOMPOSITIONS = {torch.ops.diffusiongemma.normed_heads.default: normed_heads_triton}
