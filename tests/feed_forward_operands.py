"""Random operands of the feed-forward operator, on the CPU."""

import torch

from plugins.moe.fp8 import to_fp8

TOP_K, EPS = 8, 1e-6


def operands(rows: int, columns: int = 64, width: int = 32, num_experts: int = 16, *, fp8: bool = False) -> tuple:
    """All of the operator's tensors, in bfloat16."""

    def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape) * scale).bfloat16()

    norms = [1 + tensor(columns, scale=0.1) for _ in range(7)]
    dense = [tensor(6 * width, columns, scale=columns**-0.5), tensor(columns, 3 * width, scale=width**-0.5)]
    router = [3 * tensor(columns), tensor(num_experts, columns), 1 + tensor(num_experts, scale=0.1)]
    gate_up, down = tensor(num_experts, 2 * width, columns), tensor(num_experts, columns, width)
    experts = [gate_up * columns**-0.5, down * width**-0.5]
    if fp8:
        experts = [part for weights in experts for part in to_fp8(weights)]
    return tensor(rows, columns), tensor(rows, columns), norms, tensor(1), dense, router, experts
