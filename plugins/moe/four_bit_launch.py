"""How the kernels of experts in 4 bits are launched, which are those of packed ones; `weighted_rows` is both products.

See the package's docstring for its arguments, `plugins.moe.packed_launch` for the launches, and `plugins.moe.launch` for the
stages that it shares with other weights.
"""

import torch
from torch import Tensor

from plugins.moe import launch, packed_launch
from plugins.moe.arranged_launch import arranged_tile, check_weights
from plugins.moe.launch import Routing, Tile
from plugins.moe.nvfp4 import is_nvfp4
from plugins.triton_launch import Wrap, unwrapped

FEW_ROWS, FEW_ROWS_DOWN = arranged_tile(32, 128, 4, 5), arranged_tile(32, 128, 4, 4)
"""NVIDIA H200, Triton 3.6, gate_up + down at 256 rows: 101 + 59 µs, packed 186 + 102. gate_up in 3 / 4 stages: 105 / 101, 64
wide: 111 to 114, 256 wide in 4 / 8 warps: 113 / 115; down in 3 / 5 stages: 61 / 60, 64 wide: 66; of 16 rows: 118 + 63 at best.
Steps 128 deep: 98 + 65."""

SOME_ROWS = arranged_tile(64, 128, 4, 4)
"""The same at 1024 rows: 184 + 114 µs, packed 227 + 135; 3 / 5 stages: 192 + 117 / 188 + 116; 256 wide: 214 + 113; 64 wide: 200
+ 134; steps 128 deep: 183 + 120."""

MANY_ROWS, MANY_ROWS_DOWN = arranged_tile(128, 128, 8, 4), arranged_tile(128, 128, 4, 3)
"""The same at 2048 / 4096 / 8192 rows, where a scale took an instruction more: 302 + 194 / 524 + 326 / 910 + 624 µs, packed 336
+ 213 / 574 + 354 / 1009 + 724; gate_up in 4 warps: 318 / 560 / 949, 3 stages: 303 / 527 / 980; down in 4 stages: 193 / 332 /
634, in 8 warps: 296 / 498 / 984; 64 rows, 256 wide: 351 + 190 / 604 + 334 / 1149 + 686."""

_DOWN_TILES = {FEW_ROWS: FEW_ROWS_DOWN, MANY_ROWS: MANY_ROWS_DOWN}

FLOAT32 = arranged_tile(32, 64, 4, 2)
"""As `plugins.moe.launch.FLOAT32`."""


def choose_tile(num_rows: int, top_k: int, num_experts: int, dtype: torch.dtype) -> Tile:
    """The tile for `num_rows` rows, a number that is known."""
    if dtype == torch.float32:
        return FLOAT32
    return launch.by_rows_of_an_expert(num_rows * top_k // num_experts, FEW_ROWS, SOME_ROWS, MANY_ROWS)


def choose_down_tile(tile: Tile) -> Tile:
    """The tile of the second product, next to that of the first; they have the same rows."""
    return _DOWN_TILES.get(tile, tile)


def weighted_rows(
    rows: Tensor,
    routing: Routing,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    tile: Tile,
    down_tile: Tile | None = None,
    wrap: Wrap = unwrapped,
) -> Tensor:
    """Both products, without the sum over a row's experts: weighted [N * k, D].

    Raises:
        ValueError: weights that are not in 4 bits or not contiguous.
    """
    stored = "nvfp4" if is_nvfp4(gate_up_proj) else "int4"
    check_weights(f"experts_{stored}", stored, gate_up_proj, down_proj, rows.shape[1])
    return packed_launch.products(rows, routing, gate_up_proj, down_proj, 1.0, tile, choose_down_tile(tile), down_tile, wrap)
