"""The definitions of the operators of the mixture of experts."""

import torch
from torch.nn.functional import gelu, linear


def experts_reference(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> torch.Tensor:
    """See the package's docstring: one row and one expert at a time, summed in float32."""
    output = torch.zeros(hidden.shape, dtype=torch.float32)
    for row in range(hidden.shape[0]):
        for expert, weight in zip(top_k_index[row].tolist(), top_k_weights[row], strict=True):
            gate, up = linear(hidden[row], gate_up_proj[expert]).chunk(2)
            output[row] += linear(gelu(gate, approximate="tanh") * up, down_proj[expert]) * weight
    return output.to(hidden.dtype)


def choose_experts_reference(
    logits: torch.Tensor, per_expert_scale: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the package's docstring; the order of equal logits is left open."""
    probabilities = logits.float().softmax(dim=-1)
    top_k_weights, top_k_index = probabilities.topk(top_k, dim=-1)
    top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
    expert_scales = per_expert_scale.index_select(0, top_k_index.flatten()).view(-1, top_k)
    return top_k_weights * expert_scales, top_k_index
