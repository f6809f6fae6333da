"""What the launches of products with arranged weights share: tiles, grids, constants; see `plugins.moe.arranged_kernel`."""

import torch
from torch import Tensor

from plugins.moe.arranging import BLOCK, HALVES
from plugins.moe.formats import Format, dtype_in_format, shape_in_format
from plugins.moe.launch import Tile
from plugins.triton_launch import HOPPER_CAPABILITY, ceil_div

HOPPER_PARTS = 2
"""Programs of a second product's kernel for Hopper that share a tile's columns. NVIDIA H200, Triton 3.6, 2048 / 4096 / 8192 /
16384 rows of 8 experts, packed: 195 / 323 / 534 / 1006 µs; one part: 239 / 353 / 581 / 1014; in four, before the last changes:
1209 for 1137 at 16384. FP8 rows: 120 / 197 / 357 / 642; one part: 147 / 221 / 372 / 644; in three: 135 / 212 / 373 / 687."""


def arranged_tile(rows: int, width: int, num_warps: int, num_stages: int, depth: int = BLOCK) -> Tile:
    """width: a multiple of 64, of FP8 rows at most 128. depth: another multiple of 64 only with FP8 rows."""
    return Tile(rows=rows, width=width, depth=depth, num_warps=num_warps, num_stages=num_stages, weights_first=True)


def product_grid(weight: Tensor, tile_expert: Tensor, tile: Tile) -> tuple[int, int]:
    """Programs along the weight's rows and along the routed rows."""
    return ceil_div(weight.shape[1], tile.width // BLOCK), tile_expert.shape[0]


def product_constants(weight: Tensor, depth: int, width: int, tile: Tile, **others: int) -> dict[str, int]:
    """depth: columns of the weight, and of the rows that it meets. width: columns of the result."""
    num_experts, num_blocks, stride = weight.shape
    sizes = {"NUM_EXPERTS": num_experts, "NUM_BLOCKS": num_blocks, "DEPTH": depth, "WIDTH": width, **others}
    of_tile = {"TILE_ROWS": tile.rows, "TILE_DEPTH": tile.depth, "BLOCKS": tile.width // BLOCK}
    return sizes | of_tile | {"BLOCK": BLOCK, "STRIDE": stride}


def check_weights(operator: str, wanted: Format, gate_up_proj: Tensor, down_proj: Tensor, hidden_size: int) -> None:
    """Of weights of bfloat16 numbers in a format of fewer bits, for rows of `hidden_size` columns.

    Raises:
        ValueError: they are not in the format, or not contiguous.
    """
    dtype, width = getattr(torch, dtype_in_format(wanted)), gate_up_proj.shape[1] * (BLOCK // 2)
    expected = {"gate_up_proj": (2 * width, hidden_size), "down_proj": (hidden_size, width)}
    for name, weight in {"gate_up_proj": gate_up_proj, "down_proj": down_proj}.items():
        shape = shape_in_format((gate_up_proj.shape[0], *expected[name]), wanted, HALVES[name])
        if weight.dtype != dtype or tuple(weight.shape) != shape or not weight.is_contiguous():
            raise ValueError(
                f"{operator}: {name} is {list(weight.shape)} {weight.dtype} with strides {tuple(weight.stride())}, "
                f"expected {list(shape)} {dtype}, contiguous; bring it into the format {wanted} when it is loaded"
            )


def hopper_tile(down_proj: Tensor, tile: Tile) -> Tile:
    """Of a second product's kernel for Hopper, in place of `tile`, with the warps of one of its groups."""
    width = ceil_div(down_proj.shape[1], HOPPER_PARTS) * BLOCK
    return arranged_tile(tile.rows, width, num_warps=4, num_stages=1, depth=tile.depth)


def on_hopper(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) == HOPPER_CAPABILITY
