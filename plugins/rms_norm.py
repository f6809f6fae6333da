"""The norm that every part of the network shares."""

from torch import Tensor


def rms_norm(rows: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded to the dtype of `rows`."""
    wide = rows.float()
    normed = wide * ((wide * wide).mean(-1, keepdim=True) + eps).rsqrt()
    return (normed if weight is None else normed * weight.float()).to(rows.dtype)
