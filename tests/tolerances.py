"""Tolerances of comparisons between two correct implementations that round at different places.

`assert_close`, for one operator or for float32: the largest difference, as a fraction of the largest expected magnitude.
float32 rounds by 6e-8, a few hundred times in series; bfloat16 by 2^-9, and one operator rounds a few times.

`assert_as_exact`, for a whole network in bfloat16: there a rounding in the router may choose another expert, so two correct
implementations differ by much at single elements. What they must share is their distance from the float32 result.
"""

import torch

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
MAX_ERROR_RATIO = 1.5
SAME_ROUNDINGS_RATIO = 1.1  # of a translation, which rounds where its source does; a norm computed in bfloat16 gives 1.3 to 1.5


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    scale = expected.float().abs().max().item()
    difference = (actual.float() - expected.float()).abs().max().item()  # NaN fails the comparison below
    assert difference <= TOLERANCE[dtype] * scale, f"largest difference {difference:.3g}, of {scale:.3g}"


def assert_as_exact(actual: torch.Tensor, other: torch.Tensor, exact: torch.Tensor, max_ratio: float = MAX_ERROR_RATIO) -> None:
    """The root mean square error of `actual` is at most `max_ratio` times that of `other`."""
    assert actual.shape == other.shape == exact.shape
    error, allowed = ((each.float() - exact).pow(2).mean().sqrt().item() for each in (actual, other))
    assert error <= max_ratio * allowed, f"error {error:.3g}, the other's {allowed:.3g}"
