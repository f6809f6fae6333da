"""What the launches of products with arranged weights share: tiles, grids, constants; see `plugins.moe.arranged_kernel`."""

from torch import Tensor

from plugins.moe.arranging import BLOCK
from plugins.moe.launch import Tile
from plugins.triton_launch import ceil_div


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
