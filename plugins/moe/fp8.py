"""FP8 numbers with a scale: e4m3, one float32 scale for each vector of the last dimension."""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
LEAST_SCALED = 2.0**-100
"""Of a vector's largest element: keeps the scale a normal number where all elements are 0."""


def to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [..., C] in e4m3 and scales [...] float32, whose products are `values` rounded: the largest element of a vector
    becomes 448."""
    wide = values.float()
    scale = wide.abs().amax(dim=-1).clamp(min=LEAST_SCALED) / LARGEST
    return (wide / scale.unsqueeze(-1)).to(FP8), scale


def from_fp8(numbers: Tensor, scale: Tensor) -> Tensor:
    """[..., C] float32."""
    return numbers.float() * scale.unsqueeze(-1)
