"""How the second product of packed experts for Hopper is launched, and when there is a kernel for it."""

import torch
from torch import Tensor

from plugins.moe.arranging import BLOCK
from plugins.moe.hopper_down_kernel import AHEAD, hopper_down_kernel
from plugins.triton_launch import HOPPER_CAPABILITY, Launch, ceil_div

ROWS = 128
"""Of a tile. NVIDIA H200, Triton 3.6, 2048 / 4096 / 8192 / 16384 rows of 8 experts: 195 / 323 / 534 / 1006 µs; Triton's kernel
in the same runs: 212 / 353 / 639 / 1235. At 1024 rows 141, where that one, in tiles of 64 rows, takes 139."""

_PARTS = 2
"""Programs that share a tile's columns. In one part: 239 / 353 / 581 / 1014 µs; in four, before the last changes: 1209 for
1137 at 16384 rows."""

_MAX_STEPS = 11  # of 64 columns, for which shared memory has room


def has_kernel(activated: Tensor, hidden_size: int, tile_rows: int) -> bool:
    """Whether there is one for the device, the tile and the sizes."""
    steps = ceil_div(activated.shape[1], BLOCK)
    fits = tile_rows == ROWS and AHEAD < steps <= _MAX_STEPS and hidden_size % BLOCK == 0
    return fits and activated.is_cuda and torch.cuda.get_device_capability(activated.device) == HOPPER_CAPABILITY


def hopper_down(
    activated: Tensor, down_proj: Tensor, top_k_weights: Tensor, row_order: Tensor, tile_expert: Tensor, hidden_size: int
) -> Launch:
    """Outputs weighted [N * k, D]. The arguments are those of `plugins.moe.packed_launch.down`, in tiles of ROWS."""
    num_routed, width = activated.shape
    num_experts, num_blocks, stride = down_proj.shape
    blocks = ceil_div(num_blocks, _PARTS)
    return Launch(
        kernel=hopper_down_kernel,
        grid=(ceil_div(num_blocks, blocks), tile_expert.shape[0]),
        inputs=(activated, down_proj, top_k_weights, row_order, tile_expert),
        scalars=(num_routed,),
        outputs=(activated.new_empty(num_routed, hidden_size),),
        constants={
            "NUM_EXPERTS": num_experts,
            "NUM_BLOCKS": num_blocks,
            "DEPTH": width,
            "WIDTH": hidden_size,
            "TILE_ROWS": ROWS,
            "BLOCKS": blocks,
            "BLOCK": BLOCK,
            "STRIDE": stride,
        },
        num_warps=4,
        num_stages=1,
    )
