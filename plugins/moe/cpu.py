"""The CPU path of the experts operator: rows grouped by expert, two matrix products for each expert that has rows."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad

from plugins.moe.arranging import BLOCK
from plugins.moe.int4 import from_int4, is_int4
from plugins.moe.packing import is_packed, unpack

# A matrix product takes a multiple of so many rows. With few others MKL rounds differently (EPYC: 1 to 3, with two threads 5 to
# 7, 9 and 10; Xeon: 1 to 8), and a row's result would depend on how many rows share its expert, and so on the batch.
ROW_MULTIPLE = 16


def experts_cpu(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """See the package's docstring."""
    numbers = unpack if is_packed(gate_up_proj) else from_int4 if is_int4(gate_up_proj) else None
    width, hidden_size = gate_up_proj.shape[1] * BLOCK // 2, hidden.shape[1]

    def mlp(expert: int, rows: Tensor) -> Tensor:
        first, second = gate_up_proj[expert], down_proj[expert]
        if numbers:
            first = numbers(first[None], 2 * width, hidden_size, halves=2)[0].to(rows.dtype)
            second = numbers(second[None], hidden_size, width)[0].to(rows.dtype)
        return torch.mm(gated(torch.mm(rows, first.t())), second.t())

    return by_expert(mlp, hidden, top_k_index, top_k_weights, gate_up_proj.shape[0]).to(hidden.dtype)


def by_expert(
    mlp: Callable[[int, Tensor], Tensor], rows: Tensor, top_k_index: Tensor, top_k_weights: Tensor, num_experts: int
) -> Tensor:
    """[N, D] float32: the weighted sums of what `mlp(expert, rows)` makes of each expert's rows.

    1. Sort the N * k routed rows by expert. 2. Run each expert that has rows on its slice, filled up with rows of zeros.
    3. Weight and combine.
    """
    num_rows, top_k = top_k_index.shape
    # 1.
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=num_experts).tolist()
    rows = rows.index_select(0, order.div(top_k, rounding_mode="floor"))
    # 2.
    routed = torch.empty_like(rows)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            filled = pad(rows[start : start + count], (0, 0, 0, -count % ROW_MULTIPLE))
            routed[start : start + count] = mlp(expert, filled)[:count]
            start += count
    # 3.
    weighted = torch.empty_like(routed)
    weighted[order] = routed
    return torch.bmm(top_k_weights.unsqueeze(1), weighted.view(num_rows, top_k, rows.shape[1]).float()).squeeze(1)


def gated(gate_up: Tensor) -> Tensor:
    """[rows, 2 F] → [rows, F]."""
    gate, up = gate_up.chunk(2, dim=1)
    return gelu(gate, approximate="tanh").mul_(up)
