"""The definition of the experts operator: one row and one expert at a time, summed in float32."""

import torch
from torch.nn.functional import gelu, linear


def experts_reference(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> torch.Tensor:
    """See the package's docstring."""
    output = torch.zeros(hidden.shape, dtype=torch.float32)
    for row in range(hidden.shape[0]):
        for expert, weight in zip(top_k_index[row].tolist(), top_k_weights[row], strict=True):
            gate, up = linear(hidden[row], gate_up_proj[expert]).chunk(2)
            output[row] += linear(gelu(gate, approximate="tanh") * up, down_proj[expert]) * weight
    return output.to(hidden.dtype)
