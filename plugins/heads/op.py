"""The heads operator as programs call it (see the package's docstring)."""

import torch

from plugins.heads.reference import heads_reference
from plugins.library import LIBRARY

__all__ = ["normed_heads"]

LIBRARY.define(
    "normed_heads(Tensor heads, Tensor q_norm, Tensor k_norm, Tensor cos, Tensor sin, int num_kv_heads, bool has_values, "
    "float eps) -> (Tensor, Tensor)"
)
LIBRARY.impl("normed_heads", heads_reference, "CPU")


@torch.library.register_fake("diffusiongemma::normed_heads", lib=LIBRARY)
def _(heads, q_norm, k_norm, cos, sin, num_kv_heads, has_values, eps):
    num_tokens, head_dim = heads.shape[0], cos.shape[-1]
    num_heads = heads.shape[1] // head_dim - num_kv_heads * (1 + has_values)
    return heads.new_empty(num_tokens, num_heads, head_dim), heads.new_empty(num_tokens, 2, num_kv_heads, head_dim)


normed_heads = torch.ops.diffusiongemma.normed_heads.default

PLAIN_DECOMPOSITIONS = {normed_heads: heads_reference}
"""For compilers that do the operator as well from its definition."""

if torch.version.cuda:  # CPU builds of PyTorch come without triton, and have no use for it
    from plugins.heads import cuda  # noqa: F401
