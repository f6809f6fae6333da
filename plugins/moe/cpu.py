"""The CPU path of the experts operator: rows grouped by expert, two matrix products for each expert that has rows."""

import torch
from torch.nn.functional import gelu, pad

from plugins.moe.arranging import BLOCK
from plugins.moe.packing import is_packed, unpack

# Rows that a matrix product takes at a time. With other small counts (1, 2, 3, with two threads 5 to 7, 9 and 10) MKL rounds
# differently, and a row's result would depend on how many other rows share its expert, and so on the rest of the batch.
_ROW_MULTIPLE = 4


def experts_cpu(
    hidden: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> torch.Tensor:
    """See the package's docstring.

    1. Sort the N * k routed rows by expert. 2. Run each expert that has rows on its slice, filled up with rows of zeros.
    3. Weight and combine in float32.
    """
    num_rows, top_k = top_k_index.shape
    packed, hidden_size = is_packed(gate_up_proj), hidden.shape[1]
    width = gate_up_proj.shape[1] * BLOCK // 2 if packed else down_proj.shape[2]
    # 1.
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=gate_up_proj.shape[0]).tolist()
    rows = hidden.index_select(0, order.div(top_k, rounding_mode="floor"))
    # 2.
    routed = torch.empty_like(rows)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        filled = pad(rows[start : start + count], (0, 0, 0, -count % _ROW_MULTIPLE))
        first, second = gate_up_proj[expert], down_proj[expert]
        if packed:
            first = unpack(first[None], 2 * width, hidden_size, halves=2)[0]
            second = unpack(second[None], hidden_size, width)[0]
        gate_up = torch.mm(filled, first.t())
        activated = gelu(gate_up[:, :width], approximate="tanh").mul_(gate_up[:, width:])
        routed[start : start + count] = torch.mm(activated, second.t())[:count]
        start += count
    # 3.
    weighted = torch.empty_like(routed)
    weighted[order] = routed
    return torch.bmm(top_k_weights.unsqueeze(1), weighted.view(num_rows, top_k, -1).float()).squeeze(1).to(hidden.dtype)
