"""The CPU path of the experts operator: rows grouped by expert, two matrix products for each expert that has rows."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad

from plugins.moe.arranging import BLOCK
from plugins.moe.fp8 import from_fp8
from plugins.moe.int4 import from_int4, is_int4
from plugins.moe.nvfp4 import from_nvfp4, is_nvfp4
from plugins.moe.packing import is_packed, unpack

# A matrix product takes a multiple of so many rows. With few others MKL rounds differently (EPYC: 1 to 3, with two threads 5 to
# 7, 9 and 10; Xeon: 1 to 8), and a row's result would depend on how many rows share its expert, and so on the batch.
ROW_MULTIPLE = 16


def experts_cpu(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """See the package's docstring. Products with NVFP4 weights are in float32: their factors make them numbers of no other
    dtype."""
    width, hidden_size = gate_up_proj.shape[1] * BLOCK // 2, hidden.shape[1]
    in_float32 = is_nvfp4(gate_up_proj)

    def numbers(weight: Tensor, *sizes: int, halves: int) -> Tensor:
        if is_packed(weight):
            return unpack(weight[None], *sizes, halves)[0]
        if is_int4(weight):
            return from_int4(weight[None], *sizes, halves)[0]
        return from_fp8(*from_nvfp4(weight[None], *sizes, halves))[0] if is_nvfp4(weight) else weight

    def mlp(expert: int, rows: Tensor) -> Tensor:
        first = numbers(gate_up_proj[expert], 2 * width, hidden_size, halves=2).to(rows.dtype)
        activated = gated(torch.mm(rows, first.t())).to(hidden.dtype)
        second = numbers(down_proj[expert], hidden_size, width, halves=1).to(rows.dtype)
        return torch.mm(activated.to(rows.dtype), second.t())

    read = hidden.float() if in_float32 else hidden
    return by_expert(mlp, read, top_k_index, top_k_weights, gate_up_proj.shape[0]).to(hidden.dtype)


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
