"""The CPU path of the experts operator with FP8 weights: as the one of other weights, in float32.

It shows what FP8 does to a checkpoint's answers. Quicker it is not: a CPU has no FP8, so that every expert's numbers are
converted whenever they are read.
"""

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad

from plugins.moe.fp8 import from_fp8, to_fp8

_ROW_MULTIPLE = 4
"""See `plugins.moe.cpu`."""


def experts_fp8_cpu(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_proj_scale: Tensor,
    down_proj: Tensor,
    down_proj_scale: Tensor,
    fp8_rows: bool,
) -> Tensor:
    """See the package's docstring.

    1. Sort the N * k routed rows by expert. 2. Run each expert that has rows on its slice, filled up with rows of zeros.
    3. Weight and combine.
    """
    num_rows, top_k = top_k_index.shape
    width = down_proj.shape[2]
    # 1.
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=gate_up_proj.shape[0]).tolist()
    rows = _as_read(hidden, fp8_rows).index_select(0, order.div(top_k, rounding_mode="floor"))
    # 2.
    routed = torch.empty_like(rows)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        filled = pad(rows[start : start + count], (0, 0, 0, -count % _ROW_MULTIPLE))
        gate_up = torch.mm(filled, from_fp8(gate_up_proj[expert], gate_up_proj_scale[expert]).t())
        activated = gelu(gate_up[:, :width], approximate="tanh").mul_(gate_up[:, width:]).to(hidden.dtype)
        down = from_fp8(down_proj[expert], down_proj_scale[expert])
        routed[start : start + count] = torch.mm(_as_read(activated, fp8_rows), down.t())[:count]
        start += count
    # 3.
    weighted = torch.empty_like(routed)
    weighted[order] = routed
    return torch.bmm(top_k_weights.unsqueeze(1), weighted.view(num_rows, top_k, -1)).squeeze(1).to(hidden.dtype)


def _as_read(rows: Tensor, fp8_rows: bool) -> Tensor:
    """What a product reads, in float32."""
    return from_fp8(*to_fp8(rows)) if fp8_rows else rows.float()
