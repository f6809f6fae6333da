"""Random weights of experts, in every format that kernels take."""

import math
from functools import cache

import torch

from plugins.moe.formats import Format, in_format
from plugins.moe.fp8 import from_fp8
from plugins.moe.int4 import from_int4
from plugins.moe.nvfp4 import GROUP, numbers_of

HIDDEN, WIDTH, EXPERTS = 2816, 704, 128
"""Of the 26B model."""

_DEVIATION = 7.74
"""Of the products of numbers and scales below."""


def random_rows(shape: tuple[int, int, int], device: str) -> torch.Tensor:
    """[E, R, bytes] uint8 of a weight [E, R, C] whose numbers have a standard deviation near C^-0.5. Their factor is a power of
    two, so that they are bfloat16 numbers."""
    num_experts, rows, columns = shape
    numbers = torch.randint(256, (num_experts, rows, columns // 2), dtype=torch.uint8, device=device)
    scales = (1 + 3 * torch.rand(num_experts, rows, columns // GROUP, device=device)).to(torch.float8_e4m3fn)
    factor = 2.0 ** round(math.log2(columns**-0.5 / _DEVIATION))
    factors = torch.full((num_experts, rows, 1), factor, device=device).view(torch.uint8)
    return torch.cat([numbers, scales.view(torch.uint8), factors], dim=-1)


@cache
def expert_weights(stored: Format | None) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """gate_up_proj and down_proj in a format, and the bfloat16 numbers that they stand for (of packed ones before packing)."""
    shapes = {2: (EXPERTS, 2 * WIDTH, HIDDEN), 1: (EXPERTS, HIDDEN, WIDTH)}
    weights, numbers = [], []
    for halves, shape in shapes.items():
        if stored == "nvfp4":
            own = random_rows(shape, "cuda")
        else:
            own = torch.randn(shape, dtype=torch.bfloat16, device="cuda") * shape[2] ** -0.5
        formed = torch.cat([in_format(each, stored, halves) for each in own.split(4)]) if stored else own
        weights.append(formed)
        numbers.append(
            torch.cat([_numbers_of(*parts, stored, halves) for parts in zip(own.split(4), formed.split(4), strict=True)])
        )
    return tuple(weights), tuple(numbers)


def _numbers_of(own: torch.Tensor, formed: torch.Tensor, stored: Format | None, halves: int) -> torch.Tensor:
    """In bfloat16: what a weight, and what became of it in a format, stands for."""
    if stored == "nvfp4":
        return from_fp8(*numbers_of(own)).bfloat16()
    return from_int4(formed, *own.shape[1:], halves) if stored == "int4" else own
