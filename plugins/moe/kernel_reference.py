"""The definition of each kernel of `plugins.moe.kernel` in plain PyTorch, one routed row at a time, summed in float32.

See that module for the shape legend.
"""

import torch
from torch import Tensor
from torch.nn.functional import gelu


def router_reference(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """top_k_weights [N, k] float32 and top_k_index [N, k] int64; of equal logits the lower index comes first.

    The network's `route` after its linear layer, where `topk` leaves the order of equal probabilities open.
    """
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    index = logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probabilities.gather(1, index)
    return weights / weights.sum(dim=-1, keepdim=True) * per_expert_scale[index], index


def align_reference(top_k_index: Tensor, num_experts: int, tile_rows: int) -> tuple[list[int], list[int]]:
    """The slots of the used tiles, and the experts of the used tiles."""
    flat = top_k_index.flatten().tolist()
    slots, tile_experts = [], []
    for expert in range(num_experts):
        routed = [place for place, chosen in enumerate(flat) if chosen == expert]
        tiles = -(-len(routed) // tile_rows)
        slots += routed + [len(flat)] * (tiles * tile_rows - len(routed))
        tile_experts += [expert] * tiles
    return slots, tile_experts


def gate_up_reference(hidden: Tensor, gate_up_proj: Tensor, top_k_index: Tensor) -> Tensor:
    """activated [N * k, F]."""
    activated = []
    for row, experts in zip(hidden.float(), top_k_index.tolist(), strict=True):
        for expert in experts:
            gate, up = (gate_up_proj[expert].float() @ row).chunk(2)
            activated.append(gelu(gate, approximate="tanh") * up)
    return torch.stack(activated).to(hidden.dtype)


def down_reference(activated: Tensor, down_proj: Tensor, top_k_weights: Tensor, top_k_index: Tensor) -> Tensor:
    """weighted [N * k, D]."""
    weighted = [
        weight * (down_proj[expert].float() @ row)
        for row, weight, expert in zip(activated.float(), top_k_weights.flatten(), top_k_index.flatten(), strict=True)
    ]
    return torch.stack(weighted).to(activated.dtype)


def combine_reference(weighted: Tensor, top_k: int) -> Tensor:
    """[N, D]."""
    return weighted.float().unflatten(0, (-1, top_k)).sum(dim=1).to(weighted.dtype)
