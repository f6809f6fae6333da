"""The definition of the heads operator."""

import torch
from torch import Tensor

from plugins.rms_norm import rms_norm


def heads_reference(
    heads: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, has_values: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """See the package's docstring."""
    heads = heads.unflatten(1, (-1, cos.shape[-1]))
    num_heads = heads.shape[1] - num_kv_heads * (1 + has_values)
    query, key, *values = heads.split([num_heads] + [num_kv_heads] * (1 + has_values), dim=1)
    value = rms_norm(*(values or [key]), None, eps)
    query = rotate(rms_norm(query, q_norm, eps), cos, sin)
    key = rotate(rms_norm(key, k_norm, eps), cos, sin)
    return query, torch.stack([key, value], dim=1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + head_dim / 2): [T, heads, head_dim]."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin
