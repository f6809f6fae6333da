"""How the kernels of FP8 experts are launched; `experts_fp8` is the whole operator: align, gate_up, down, combine, with the
rows made ready before each product.

See the package's docstring for its arguments, `plugins.moe.fp8_kernel` for the kernels, and `plugins.moe.launch` for the
stages that it shares with other weights.
"""

import torch
import triton
from torch import Tensor

from plugins.moe import fp8_kernel, launch
from plugins.moe.launch import FLOAT32, Tile
from plugins.triton_launch import Launch, Wrap, unwrapped

FEW_ROWS = Tile(rows=32, width=128, depth=128, num_warps=4, num_stages=3)
FEW_ROWS_DOWN = Tile(rows=32, width=128, depth=64, num_warps=4, num_stages=4)
"""NVIDIA H200, Triton 3.6, float16 rows, the operator at 256 rows: 244 µs; 16 rows: 259; weights_first: 288."""

SOME_ROWS = Tile(rows=64, width=128, depth=128, num_warps=4, num_stages=3, weights_first=True)
SOME_ROWS_DOWN = Tile(rows=64, width=128, depth=64, num_warps=4, num_stages=4, weights_first=True)
"""The same at 1024 rows: 536 µs; 64 x 256 x 64, 8 warps, not weights_first: 532."""

MANY_ROWS = Tile(rows=128, width=128, depth=64, num_warps=4, num_stages=4, weights_first=True)
"""The same at 8192 rows: 2278 µs; 8 warps: 2638; not weights_first: 2479; 256 wide: 2662; 128 deep: 3830."""

FEW_FP8_ROWS = Tile(rows=32, width=128, depth=128, num_warps=4, num_stages=3, weights_first=True)
"""FP8 rows at 256 rows, also in the second product: 222 µs; that 64 deep: 229; 4 stages: 232; 256 wide: 239; 16 rows: 242."""

FEW_FP8_ROWS_DOWN = Tile(rows=32, width=64, depth=128, num_warps=4, num_stages=4, weights_first=True)
"""The second product of 256 FP8 rows alone: 74.5 µs; 3 stages: 74.9; 128 wide, 3 stages: 76.3."""

MANY_FP8_ROWS = Tile(rows=128, width=128, depth=128, num_warps=4, num_stages=3, weights_first=True)
"""FP8 rows at 8192 rows: 1380 µs; 64 deep: 1545; 8 warps: 1798; 256 wide: 1591."""

_DOWN_TILES = {FEW_ROWS: FEW_ROWS_DOWN, SOME_ROWS: SOME_ROWS_DOWN, FEW_FP8_ROWS: FEW_FP8_ROWS_DOWN}


def choose_tile(num_rows: int, top_k: int, num_experts: int, dtype: torch.dtype, fp8_rows: bool) -> Tile:
    """The tile for `num_rows` rows, a number that is known; `dtype` is the model's."""
    if dtype == torch.float32:
        return FLOAT32
    rows_of_an_expert = num_rows * top_k // num_experts
    if rows_of_an_expert >= 128:
        return MANY_FP8_ROWS if fp8_rows else MANY_ROWS
    if rows_of_an_expert >= 32:
        return SOME_ROWS
    return FEW_FP8_ROWS if fp8_rows else FEW_ROWS


def choose_down_tile(tile: Tile) -> Tile:
    """The tile of the second product, next to that of the first; they have the same rows."""
    return _DOWN_TILES.get(tile, tile)


def scale_rows(rows: Tensor, dtype: torch.dtype) -> Launch:
    """Outputs scaled_rows [R, C] in `dtype` and row_scale [R] float32."""
    num_rows, columns = rows.shape
    return Launch(
        kernel=fp8_kernel.scale_rows_kernel,
        grid=(num_rows,),
        inputs=(rows,),
        scalars=(),
        outputs=(rows.new_empty(num_rows, columns, dtype=dtype), rows.new_empty(num_rows, dtype=torch.float32)),
        constants={"COLUMNS": columns, "BLOCK": triton.next_power_of_2(columns)},
        num_warps=4,
        num_stages=1,
    )


def gate_up(
    scaled_rows: Tensor,
    row_scale: Tensor,
    gate_up_proj: Tensor,
    weight_scale: Tensor,
    row_order: Tensor,
    tile_expert: Tensor,
    top_k: int,
    tile: Tile,
    dtype: torch.dtype,
) -> Launch:
    """Outputs activated [N * k, F] in `dtype`, the model's."""
    num_rows, hidden_size = scaled_rows.shape
    width, tile_width = gate_up_proj.shape[1] // 2, tile.width // 2
    return Launch(
        kernel=fp8_kernel.gate_up_fp8_kernel,
        grid=(launch.ceil_div(width, tile_width), tile_expert.shape[0]),
        inputs=(scaled_rows, row_scale, gate_up_proj, weight_scale, row_order, tile_expert),
        scalars=(num_rows * top_k,),
        outputs=(scaled_rows.new_empty(num_rows * top_k, width, dtype=dtype),),
        constants={"NUM_EXPERTS": gate_up_proj.shape[0], "HIDDEN": hidden_size, "WIDTH": width, "TOP_K": top_k}
        | launch.tile_constants(tile, tile_width),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def down(
    scaled_rows: Tensor,
    row_scale: Tensor,
    down_proj: Tensor,
    weight_scale: Tensor,
    top_k_weights: Tensor,
    row_order: Tensor,
    tile_expert: Tensor,
    tile: Tile,
    dtype: torch.dtype,
) -> Launch:
    """Outputs weighted [N * k, D] in `dtype`, the model's."""
    num_routed, width = scaled_rows.shape
    hidden_size = down_proj.shape[1]
    return Launch(
        kernel=fp8_kernel.down_fp8_kernel,
        grid=(launch.ceil_div(hidden_size, tile.width), tile_expert.shape[0]),
        inputs=(scaled_rows, row_scale, down_proj, weight_scale, top_k_weights, row_order, tile_expert),
        scalars=(num_routed,),
        outputs=(scaled_rows.new_empty(num_routed, hidden_size, dtype=dtype),),
        constants={"NUM_EXPERTS": down_proj.shape[0], "HIDDEN": hidden_size, "WIDTH": width}
        | launch.tile_constants(tile, tile.width),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def row_dtype(dtype: torch.dtype, fp8_rows: bool) -> torch.dtype:
    """What rows of the model's dtype are multiplied in."""
    if fp8_rows:
        return torch.float8_e4m3fn
    return torch.float32 if dtype == torch.float32 else torch.float16


def experts_fp8(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_proj_scale: Tensor,
    down_proj: Tensor,
    down_proj_scale: Tensor,
    fp8_rows: bool,
    *,
    tile: Tile | None = None,
    down_tile: Tile | None = None,
    wrap: Wrap = unwrapped,
) -> Tensor:
    """The operator as the package describes it, on the current stream; waits for nothing.

    Raises:
        ValueError: the weights are not e4m3, or weights or scales not contiguous.
    """
    dtype, rows_in = hidden.dtype, row_dtype(hidden.dtype, fp8_rows)
    num_experts, top_k = gate_up_proj.shape[0], top_k_index.shape[1]
    tile = tile or choose_tile(hidden.shape[0], top_k, num_experts, dtype, fp8_rows)
    scaled = scale_rows(hidden.contiguous(), rows_in).run(wrap)
    weights = (gate_up_proj, gate_up_proj_scale, down_proj, down_proj_scale)
    choices = {"dtype": dtype, "tile": tile, "down_tile": down_tile}
    weighted = weighted_rows(scaled, top_k_index, top_k_weights, *weights, **choices, wrap=wrap)
    (output,) = launch.combine(weighted, top_k).run(wrap)
    return output


def weighted_rows(
    scaled: tuple[Tensor, Tensor],
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_proj_scale: Tensor,
    down_proj: Tensor,
    down_proj_scale: Tensor,
    *,
    dtype: torch.dtype,
    tile: Tile,
    down_tile: Tile | None = None,
    wrap: Wrap = unwrapped,
) -> Tensor:
    """The operator from its rows as `scale_rows` makes them, without its sum over a row's experts: weighted [N * k, D] in
    `dtype`, the model's. Raises as `experts_fp8`."""
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if weight.dtype != torch.float8_e4m3fn:
            raise ValueError(f"experts_fp8: {name} is {weight.dtype}, expected torch.float8_e4m3fn; quantize the checkpoint")
    given = {"gate_up_proj": gate_up_proj, "gate_up_proj_scale": gate_up_proj_scale}
    for name, weight in (given | {"down_proj": down_proj, "down_proj_scale": down_proj_scale}).items():
        if not weight.is_contiguous():
            raise ValueError(f"experts_fp8: {name} has strides {tuple(weight.stride())}; make it contiguous when it is loaded")
    rows, row_scale = scaled
    top_k, num_experts, down_tile = top_k_index.shape[1], gate_up_proj.shape[0], down_tile or choose_down_tile(tile)
    top_k_index, top_k_weights = top_k_index.contiguous(), top_k_weights.contiguous()
    row_order, tile_expert = launch.align(top_k_index, num_experts, tile.rows).run(wrap)
    first = gate_up(rows, row_scale, gate_up_proj, gate_up_proj_scale, row_order, tile_expert, top_k, tile, dtype)
    (activated,) = first.run(wrap)
    activated, row_scale = scale_rows(activated, rows.dtype).run(wrap)
    second = down(activated, row_scale, down_proj, down_proj_scale, top_k_weights, row_order, tile_expert, down_tile, dtype)
    (weighted,) = second.run(wrap)
    return weighted
