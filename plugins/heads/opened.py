"""The heads operator, open to compilers; see `plugins.attention.opened`."""

from torch import Tensor
from torch.library import triton_op, wrap_triton

from plugins.heads import launch
from plugins.heads.op import normed_heads


@triton_op("diffusiongemma::normed_heads_triton", mutates_args={})
def normed_heads_triton(
    heads: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, has_values: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """As `normed_heads`, open to compilers."""
    return launch.normed_heads(heads, q_norm, k_norm, cos, sin, num_kv_heads, has_values, eps, wrap=wrap_triton)


CUDA_DECOMPOSITIONS = {normed_heads: normed_heads_triton}
