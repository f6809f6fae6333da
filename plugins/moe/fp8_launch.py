"""How the kernels of FP8 experts are launched; `experts_fp8` is the whole operator: align, gate_up, down, combine, with the
rows made ready before each product.

See the package's docstring for its arguments, `plugins.moe.fp8_kernel` for the kernels, and `plugins.moe.launch` for the
stages that it shares with other weights.
"""

import torch
import triton
from torch import Tensor

from plugins.moe import fp8_kernel, launch
from plugins.moe.arranged_launch import arranged_tile, hopper_tile, on_hopper, product_constants, product_grid
from plugins.moe.arranging import BLOCK, HALVES, arranged_shape, num_depths
from plugins.moe.hopper_down_fp8_kernel import hopper_down_fp8_kernel
from plugins.moe.hopper_down_kernel import DEPTHS, hopper_down_wide_kernel
from plugins.moe.launch import Routing, Tile
from plugins.triton_launch import Launch, Wrap, ceil_div, unwrapped

FEW_ROWS, FEW_ROWS_DOWN = arranged_tile(32, 64, 4, 3), arranged_tile(32, 64, 4, 4)
"""NVIDIA H100, Triton 3.6, gate_up + down at 256 rows in float16 / e4m3: 178 + 98 / 177 + 97 µs; 128 wide: 185 + 99 / 128 deep,
too, 176 + 100. A plain read of as many bytes by one kernel: 164 + 82. H200, e4m3: 125 + 72; gate_up in 4 to 8 stages: 128 to
129, 128 wide and deep: 126; down in 6 / 8 stages: 71 / 72."""

SOME_ROWS = arranged_tile(64, 128, 4, 4)
"""The same in float16 at 512 / 1024 rows: 189 + 108 / 218 + 127 µs; 64 wide: 193 + 113 / 219 + 144."""

SOME_FP8_ROWS, SOME_FP8_ROWS_DOWN = arranged_tile(64, 64, 4, 4, depth=128), arranged_tile(64, 128, 4, 3, depth=128)
"""The same in e4m3: 186 + 104 / 194 + 123 µs; the other way round: 183 + 108 / 199 + 139; 64 deep, 64 wide: 188 + 108 / 210 +
134."""

MANY_ROWS = arranged_tile(128, 128, 4, 4)
"""The same in float16 at 2048 / 4096 / 8192 / 16384 rows: 295 + 199 / 486 + 320 / 874 + 629 / 1676 + 1183 µs; 3 stages: 313 +
211 / 492 + 335 / 895 + 615 / 1822 + 1194; 8 warps at 8192: 1240 + 874."""

MANY_FP8_ROWS = arranged_tile(128, 128, 4, 3, depth=128)
"""The same in e4m3: 240 + 183 / 350 + 287 / 602 + 501 / 1136 + 1007 µs; 64 deep, 4 stages: 261 + 186 / 407 + 299 / 719 + 524 /
1413 + 1050; that 64 wide: 270 + 188 / 437 + 301 / 796 + 541 / 1549 + 1074; 8 warps at 8192: 858 + 724."""

_HOPPER_DEPTHS = range(2, 13)
"""How many times 64 columns FP8 rows may have: one whole step, and what shared memory has room for. NVIDIA H200, Triton 3.6,
the kernel for Hopper at 512 / 1024 / 2048 / 4096 / 8192 / 16384 rows: 75 / 88 / 120 / 197 / 357 / 642 µs, Triton's 80 / 104 /
170 / 268 / 490 / 919; in tiles of the other size, 1024 to 4096: 85 / 127 / 217."""

_SCALED_ROWS = 2
"""Rows of a program of scale_rows. NVIDIA H200, Triton 3.6, 704 columns, 2048 / 8192 / 32768 / 131072 rows: 2.8 / 5.5 / 19.9 /
71.7 µs in one warp, in 4: 2.7 / 5.9 / 21.9 / 79.5; one row in one warp: 2.9 / 6.6 / 21.8 / 81.2, in 4: 2.7 / 6.5 / 23.8 / 87.6;
4 rows in 4 warps: 2.7 / 5.8 / 21.0 / 75.6."""

_DOWN_TILES = {FEW_ROWS: FEW_ROWS_DOWN, SOME_FP8_ROWS: SOME_FP8_ROWS_DOWN}

FLOAT32 = arranged_tile(32, 64, 4, 2)
"""As `plugins.moe.launch.FLOAT32`."""


def choose_tile(num_rows: int, top_k: int, num_experts: int, dtype: torch.dtype, fp8_rows: bool) -> Tile:
    """The tile for `num_rows` rows, a number that is known; `dtype` is the model's."""
    if dtype == torch.float32:
        return FLOAT32
    some, many = (SOME_FP8_ROWS, MANY_FP8_ROWS) if fp8_rows else (SOME_ROWS, MANY_ROWS)
    return launch.by_rows_of_an_expert(num_rows * top_k // num_experts, FEW_ROWS, some, many)


def choose_down_tile(tile: Tile) -> Tile:
    """The tile of the second product, next to that of the first; they have the same rows."""
    return _DOWN_TILES.get(tile, tile)


def hopper_kernel(activated: Tensor, hidden_size: int, tile: Tile) -> object | None:
    """The kernel that the second product has for Hopper, if it has one: for the rows, the device, the first one's tile, and the
    sizes."""
    width = activated.shape[1]
    depths = num_depths(width)
    if hidden_size % BLOCK or width * activated.element_size() % 16 or not on_hopper(activated):
        return None
    if activated.dtype == torch.float8_e4m3fn:
        fits = tile.rows in (SOME_FP8_ROWS.rows, MANY_FP8_ROWS.rows) and depths in _HOPPER_DEPTHS
        return hopper_down_fp8_kernel if fits else None
    fits = activated.dtype == torch.float16 and tile.rows == MANY_ROWS.rows and depths in DEPTHS
    return hopper_down_wide_kernel if fits else None


def scale_rows(rows: Tensor, dtype: torch.dtype) -> Launch:
    """Outputs scaled_rows [R, C] in `dtype` and row_scale [R] float32."""
    num_rows, columns = rows.shape
    block = triton.next_power_of_2(columns)
    return Launch(
        kernel=fp8_kernel.scale_rows_kernel,
        grid=(ceil_div(num_rows, _SCALED_ROWS),),
        inputs=(rows,),
        scalars=(num_rows,),
        outputs=(rows.new_empty(num_rows, columns, dtype=dtype), rows.new_empty(num_rows, dtype=torch.float32)),
        constants={"COLUMNS": columns, "BLOCK": block, "ROWS": _SCALED_ROWS},
        num_warps=min(8, max(1, _SCALED_ROWS * block // 2048)),  # 64 elements a thread
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
    (num_rows, hidden_size), width = scaled_rows.shape, weight_scale.shape[1] // 2
    return Launch(
        kernel=fp8_kernel.gate_up_fp8_kernel,
        grid=product_grid(gate_up_proj, tile_expert, tile),
        inputs=(scaled_rows, row_scale, gate_up_proj, weight_scale, row_order, tile_expert),
        scalars=(num_rows * top_k,),
        outputs=(scaled_rows.new_empty(num_rows * top_k, width, dtype=dtype),),
        constants=product_constants(gate_up_proj, hidden_size, width, tile, TOP_K=top_k),
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
    kernel: object = fp8_kernel.down_fp8_kernel,
    weighted: Tensor | None = None,
) -> Launch:
    """Outputs weighted [N * k, D] in `dtype`, the model's: the one that is given, or a new one. kernel: or that for Hopper,
    with its tile and the weights as int32."""
    (num_routed, width), hidden_size = scaled_rows.shape, weight_scale.shape[1]
    return Launch(
        kernel=kernel,
        grid=product_grid(down_proj, tile_expert, tile),
        inputs=(scaled_rows, row_scale, down_proj, weight_scale, top_k_weights, row_order, tile_expert),
        scalars=(num_routed,),
        outputs=(scaled_rows.new_empty(num_routed, hidden_size, dtype=dtype) if weighted is None else weighted,),
        constants=product_constants(down_proj, width, hidden_size, tile),
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
        ValueError: the weights are not e4m3 or not arranged (`plugins.moe.arranging`), or weights or scales not contiguous.
    """
    dtype, rows_in = hidden.dtype, row_dtype(hidden.dtype, fp8_rows)
    num_experts, top_k = gate_up_proj.shape[0], top_k_index.shape[1]
    tile = tile or choose_tile(hidden.shape[0], top_k, num_experts, dtype, fp8_rows)
    scaled = scale_rows(hidden.contiguous(), rows_in).run(wrap)
    routing = launch.route(top_k_index, top_k_weights, num_experts, tile, wrap)
    weights = (gate_up_proj, gate_up_proj_scale, down_proj, down_proj_scale)
    weighted = weighted_rows(scaled, routing, *weights, dtype=dtype, tile=tile, down_tile=down_tile, wrap=wrap)
    (output,) = launch.combine(weighted, top_k).run(wrap)
    return output


def weighted_rows(
    scaled: tuple[Tensor, Tensor],
    routing: Routing,
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
    """Both products, of rows as `scale_rows` makes them, without the sum over a row's experts: weighted [N * k, D] in `dtype`,
    the model's. Raises as `experts_fp8`."""
    (_, hidden_size), width = scaled[0].shape, gate_up_proj_scale.shape[1] // 2
    expected = {"gate_up_proj": (2 * width, hidden_size), "down_proj": (hidden_size, width)}
    for name, weight in {"gate_up_proj": gate_up_proj, "down_proj": down_proj}.items():
        shape = arranged_shape((gate_up_proj_scale.shape[0], *expected[name]), HALVES[name])
        if weight.dtype != torch.float8_e4m3fn or tuple(weight.shape) != shape:
            raise ValueError(
                f"experts_fp8: {name} is {list(weight.shape)} {weight.dtype}, expected {list(shape)} torch.float8_e4m3fn; "
                "quantize the checkpoint, and arrange it when it is loaded"
            )
    given = {"gate_up_proj": gate_up_proj, "gate_up_proj_scale": gate_up_proj_scale}
    for name, weight in (given | {"down_proj": down_proj, "down_proj_scale": down_proj_scale}).items():
        if not weight.is_contiguous():
            raise ValueError(f"experts_fp8: {name} has strides {tuple(weight.stride())}; make it contiguous when it is loaded")
    rows, row_scale = scaled
    row_order, tile_expert, top_k_weights, _, weighted = routing
    top_k = top_k_weights.shape[1]
    first = gate_up(rows, row_scale, gate_up_proj, gate_up_proj_scale, row_order, tile_expert, top_k, tile, dtype)
    (activated,) = first.run(wrap)
    activated, row_scale = scale_rows(activated, rows.dtype).run(wrap)
    others = (down_proj_scale, top_k_weights, row_order, tile_expert)
    kernel = hopper_kernel(activated, hidden_size, tile) if down_tile is None and wrap is unwrapped else None
    if kernel is not None:
        words = down_proj.view(torch.int32)
        second = down(activated, row_scale, words, *others, hopper_tile(words, tile), dtype, kernel, weighted)
    else:
        second = down(activated, row_scale, down_proj, *others, down_tile or choose_down_tile(tile), dtype, weighted=weighted)
    (result,) = second.run(wrap)
    return result
