"""How the MLP runs on a GPU beside the experts; see `plugins.feed_forward.mlp_kernel`."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from plugins.feed_forward.mlp_kernel import activate_kernel, mlp_down_kernel, mlp_gate_up_kernel
from plugins.moe.launch import Tile, tile_constants
from plugins.triton_launch import Launch, ceil_div

TILE = Tile(rows=128, width=128, depth=64, num_warps=8, num_stages=3)
"""NVIDIA H200, Triton 3.6, the whole operator at 256 rows, bfloat16 / FP8 rows: 411 / 249 µs; 64 x 128, 4 stages: 423 / 260;
the library's products: 424 / 261, in turn: 429 / 266; without an MLP: 402 / 239. Alone it takes 50 µs, the library's 30."""

FEW_ROWS = 512
"""From here on the library's products: NVIDIA H200, 1024 rows: 571 / 399 µs; TILE: 668 / 464."""

_ACTIVATED_ROWS, _ACTIVATED_COLUMNS, _ACTIVATED_WARPS = 4, 256, 2
"""Of a program. NVIDIA H200, Triton 3.6, 2112 columns, 512 / 1024 / 4096 / 8192 / 16384 rows: 2.8 / 3.9 / 14.1 / 26.8 / 50.8
µs; one row, 1024 columns, 4 warps: 3.0 / 4.3 / 15.5 / 31.3 / 60.4; 16 rows, 64 columns: 2.6 / 3.8 / 14.0 / 27.3 / 50.8."""


def mlp_beside(rows: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """`gated_mlp`, quick while the experts' kernels run. rows [N, D] → [N, D]."""
    if rows.shape[0] < FEW_ROWS and rows.dtype == torch.bfloat16:
        (activated,) = gate_up_launch(rows, gate_up_proj).run()
        (output,) = down_launch(activated, down_proj).run()
        return output
    (activated,) = activate_launch(linear(rows, gate_up_proj)).run()
    return linear(activated, down_proj)


def gate_up_launch(rows: Tensor, gate_up_proj: Tensor, tile: Tile = TILE) -> Launch:
    """Outputs activated [N, F]."""
    (num_rows, hidden_size), width, tile_width = rows.shape, gate_up_proj.shape[0] // 2, tile.width // 2
    return Launch(
        kernel=mlp_gate_up_kernel,
        grid=(ceil_div(width, tile_width), ceil_div(num_rows, tile.rows)),
        inputs=(rows, gate_up_proj),
        scalars=(num_rows,),
        outputs=(rows.new_empty(num_rows, width),),
        constants={"HIDDEN": hidden_size, "WIDTH": width} | tile_constants(tile, tile_width),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def down_launch(activated: Tensor, down_proj: Tensor, tile: Tile = TILE) -> Launch:
    """Outputs output [N, D]."""
    (num_rows, width), hidden_size = activated.shape, down_proj.shape[0]
    return Launch(
        kernel=mlp_down_kernel,
        grid=(ceil_div(hidden_size, tile.width), ceil_div(num_rows, tile.rows)),
        inputs=(activated, down_proj),
        scalars=(num_rows,),
        outputs=(activated.new_empty(num_rows, hidden_size),),
        constants={"HIDDEN": hidden_size, "WIDTH": width} | tile_constants(tile, tile.width),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def activate_launch(gate_up: Tensor) -> Launch:
    """Outputs activated [N, F]."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    return Launch(
        kernel=activate_kernel,
        grid=(ceil_div(width, _ACTIVATED_COLUMNS), ceil_div(num_rows, _ACTIVATED_ROWS)),
        inputs=(gate_up,),
        scalars=(num_rows,),
        outputs=(gate_up.new_empty(num_rows, width),),
        constants={"WIDTH": width, "ROWS": _ACTIVATED_ROWS, "BLOCK": _ACTIVATED_COLUMNS},
        num_warps=_ACTIVATED_WARPS,
        num_stages=1,
    )
