"""How the kernel of the heads operator is launched. See the package's docstring for the arguments."""

import math

from torch import Tensor

from plugins.heads.kernel import heads_kernel
from plugins.triton_launch import Launch, Wrap, unwrapped

_MOST_ELEMENTS = 2048
"""Of one program."""
_THREAD_ELEMENTS = 64
"""NVIDIA H200, Triton 3.6, 256 / 1024 / 4096 / 16384 tokens, heads of 256: 3.4 / 8.0 / 37.3 / 144 µs, of 512: 4.0 / 10.3 /
47.4 / 232; 32 elements: 3.8 / 8.5 / 39.5 / 152 and 4.2 / 10.1 / 47.2 / 233; 16: 4.1 / 9.1 / 40.2 / 157 and 4.6 / 12.2 / 52.8 /
270."""


def heads_launch(
    heads: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int, has_values: bool, eps: float
) -> Launch:
    """Outputs query [T, H, d] and new_kv [T, 2, K, d] in the dtype of `heads`.

    Raises:
        ValueError: d is not a power of two of at least 2.
    """
    num_tokens, head_dim = heads.shape[0], cos.shape[-1]
    if head_dim < 2 or head_dim & (head_dim - 1):
        raise ValueError(f"heads kernel: got head_dim {head_dim}, expected a power of two of at least 2")
    num_heads = heads.shape[1] // head_dim - num_kv_heads * (1 + has_values)
    shared = math.gcd(num_heads, num_kv_heads)
    together = min(shared & -shared, max(1, _MOST_ELEMENTS // head_dim))
    return Launch(
        kernel=heads_kernel,
        grid=(num_tokens, (num_heads + 2 * num_kv_heads) // together),
        inputs=(heads, q_norm, k_norm, cos, sin),
        scalars=(),
        outputs=(heads.new_empty(num_tokens, num_heads, head_dim), heads.new_empty(num_tokens, 2, num_kv_heads, head_dim)),
        constants={
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "HAS_VALUES": has_values,
            "HEAD_DIM": head_dim,
            "EPS": eps,
            "HEADS": together,
        },
        num_warps=max(1, together * head_dim // (32 * _THREAD_ELEMENTS)),
        num_stages=1,
    )


def normed_heads(
    heads: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_kv_heads: int,
    has_values: bool,
    eps: float,
    *,
    wrap: Wrap = unwrapped,
) -> tuple[Tensor, Tensor]:
    """The operator, on the current stream; waits for nothing."""
    inputs = (each.contiguous() for each in (heads, q_norm, k_norm, cos, sin))
    query, new_kv = heads_launch(*inputs, num_kv_heads, has_values, eps).run(wrap)
    return query, new_kv
