"""How the kernels of packed experts are launched, which take those in 4 bits, too; `weighted_rows` is both products.

See the package's docstring for its arguments, `plugins.moe.packed_kernel`, `plugins.moe.hopper_gate_up_kernel` and
`plugins.moe.hopper_down_kernel` for the kernels, and `plugins.moe.launch` for the stages that it shares with other weights.
"""

from dataclasses import replace

import torch
from torch import Tensor

from plugins.moe import launch, packed_kernel
from plugins.moe.arranged_launch import (
    arranged_tile,
    check_weights,
    hopper_tile,
    on_hopper,
    product_constants,
    product_grid,
)
from plugins.moe.arranging import BLOCK, num_depths
from plugins.moe.hopper_down_kernel import DEPTHS, hopper_down_packed_kernel
from plugins.moe.hopper_gate_up_kernel import PAIR, PART, hopper_gate_up_packed_kernel
from plugins.moe.launch import Routing, Tile
from plugins.moe.packing import ROW_FACTOR
from plugins.triton_launch import Launch, Wrap, multiprocessors, shared_bytes, unwrapped

FEW_ROWS, FEW_ROWS_DOWN = arranged_tile(32, 128, 4, 3), arranged_tile(32, 64, 4, 4)
"""NVIDIA H100, Triton 3.6, gate_up + down at 256 rows: 263 + 141 µs; the other way round: 263 + 144. A plain read of as many
bytes by one kernel: 246 + 123. Not packed: 353 + 188. H200: 184 + 102; gate_up 64 wide, 3 to 8 stages: 186 to 189, 256 wide, 8
warps: 184, 128 wide in 2 / 4 / 6 stages: 200 / 188 / 189; down 64 or 128 wide, 3 to 8 stages: 102 to 106."""

SOME_ROWS = arranged_tile(64, 128, 4, 4)
"""The same at 512 / 1024 rows: 277 + 151 / 294 + 163 µs, not packed 364 + 195 / 388 + 207; 64 wide: 276 + 149 / 299 + 172."""

MANY_ROWS, MANY_ROWS_DOWN = arranged_tile(128, 128, 8, 4), arranged_tile(128, 128, 4, 4)
"""The same at 2048 / 4096 / 8192 / 16384 rows: 352 + 228 / 565 + 353 / 1094 + 621 / 2044 + 1331 µs, not packed at 2048 / 8192
443 + 258 / 1082 + 644; gate_up in 4 warps: 368 / 592 / 1064 / 2021, down in 8 warps at 4096: 542; down in 3 stages: 239 / 364 /
704 / 1300; 256 rows, 64 wide: 1132 + 739 / 2193 + 1466 at the last two.
On an H200, at the last two: 1029 + 644 / 1967 + 1335; 256 rows, 128 wide, 8 warps: 1315 + 824 / 2366 + 1486."""

HOPPER_ROWS = 512
"""Of an expert, evenly spread, from which on the first product has its kernel for Hopper. NVIDIA H200, Triton 3.6, 4096 / 8192
/ 16384 / 32768 rows of 8 experts, packed: 605 / 1064 / 1961 / 3874 µs, Triton's 579 / 1129 / 2198 / 4283; int4: 515 / 935 /
1781 / 3513, 516 / 958 / 1941 / 3830; NVFP4: 558 / 1014 / 1974 / 3782, 564 / 1040 / 2111 / 4117."""

_MANY_ROWS_BYTES = 102_400
"""Of shared memory, what Triton takes for them on GPUs before Hopper."""

_DOWN_TILES = {FEW_ROWS: FEW_ROWS_DOWN, MANY_ROWS: MANY_ROWS_DOWN}


def choose_tile(num_rows: int, top_k: int, num_experts: int) -> Tile:
    """The tile for `num_rows` rows, a number that is known."""
    return launch.by_rows_of_an_expert(num_rows * top_k // num_experts, FEW_ROWS, SOME_ROWS, MANY_ROWS)


def choose_down_tile(tile: Tile) -> Tile:
    """The tile of the second product, next to that of the first; they have the same rows."""
    return _DOWN_TILES.get(tile, tile)


def has_hopper_gate_up(hidden: Tensor, gate_up_proj: Tensor, top_k: int, tile: Tile, num_experts: int) -> bool:
    """Whether the first product has a kernel for Hopper: for the device, the tile, the rows of an expert, and the sizes.
    num_experts: of the layer."""
    num_blocks = gate_up_proj.shape[1]
    fits = hidden.shape[1] % (PAIR * BLOCK) == 0 and num_blocks % PAIR == 0 and num_blocks > PART  # or Triton 3.6 fails
    many = hidden.shape[0] * top_k >= HOPPER_ROWS * num_experts and tile.rows == MANY_ROWS.rows
    return many and fits and on_hopper(hidden)


def has_hopper_down(activated: Tensor, hidden_size: int, tile: Tile) -> bool:
    """Whether the second product has one: for the device, the tile, and the sizes."""
    fits = num_depths(activated.shape[1]) in DEPTHS and hidden_size % BLOCK == 0
    return tile.rows == MANY_ROWS.rows and fits and on_hopper(activated)


def gate_up(
    hidden: Tensor,
    gate_up_proj: Tensor,
    row_order: Tensor,
    tile_expert: Tensor,
    top_k: int,
    tile: Tile,
    factor: float = ROW_FACTOR,
) -> Launch:
    """Outputs activated [N * k, F], F filled up to a multiple of 32. factor: what hidden and activated are times the rows."""
    num_rows, hidden_size = hidden.shape
    width = gate_up_proj.shape[1] * (BLOCK // 2)
    return Launch(
        kernel=packed_kernel.gate_up_packed_kernel,
        grid=product_grid(gate_up_proj, tile_expert, tile),
        inputs=(hidden, gate_up_proj, row_order, tile_expert),
        scalars=(num_rows * top_k,),
        outputs=(hidden.new_empty(num_rows * top_k, width),),
        constants=product_constants(gate_up_proj, hidden_size, width, tile, TOP_K=top_k) | {"FACTOR": factor},
        num_warps=tile.num_warps,
        num_stages=_stages(tile, gate_up_proj),
    )


def hopper_gate_up(
    hidden: Tensor,
    gate_up_proj: Tensor,
    row_order: Tensor,
    tile_expert: Tensor,
    top_k: int,
    tile: Tile,
    factor: float = ROW_FACTOR,
) -> Launch:
    """As `gate_up`, with the kernel for Hopper. tile: its rows are the kernel's, too."""
    words, own_tile = gate_up_proj.view(torch.int32), arranged_tile(tile.rows, PART * BLOCK, num_warps=4, num_stages=1)
    usual = gate_up(hidden, words, row_order, tile_expert, top_k, own_tile, factor)
    scalars = (*usual.scalars, tile_expert.shape[0])
    return replace(usual, kernel=hopper_gate_up_packed_kernel, grid=(multiprocessors(hidden),), scalars=scalars)


def down(
    activated: Tensor,
    down_proj: Tensor,
    top_k_weights: Tensor,
    row_order: Tensor,
    tile_expert: Tensor,
    hidden_size: int,
    tile: Tile,
    kernel: object = packed_kernel.down_packed_kernel,
    weighted: Tensor | None = None,
) -> Launch:
    """Outputs weighted [N * k, D]: the one that is given, or a new one. kernel: or one of `plugins.moe.hopper_down_kernel`,
    with its tile."""
    num_routed, width = activated.shape
    return Launch(
        kernel=kernel,
        grid=product_grid(down_proj, tile_expert, tile),
        inputs=(activated, down_proj, top_k_weights, row_order, tile_expert),
        scalars=(num_routed,),
        outputs=(activated.new_empty(num_routed, hidden_size) if weighted is None else weighted,),
        constants=product_constants(down_proj, width, hidden_size, tile),
        num_warps=tile.num_warps,
        num_stages=_stages(tile, down_proj),
    )


def hopper_down(
    activated: Tensor,
    down_proj: Tensor,
    top_k_weights: Tensor,
    row_order: Tensor,
    tile_expert: Tensor,
    hidden_size: int,
    tile: Tile,
    weighted: Tensor | None = None,
) -> Launch:
    """As `down`, with the kernel for Hopper. tile: of the first product."""
    words = down_proj.view(torch.int32)
    operands = (activated, words, top_k_weights, row_order, tile_expert, hidden_size)
    return down(*operands, hopper_tile(words, tile), hopper_down_packed_kernel, weighted)


def _stages(tile: Tile, weight: Tensor) -> int:
    """The tile's on the weight's GPU: some have no room for four of the largest tile's, with packed weights."""
    has_room = tile.rows < MANY_ROWS.rows or shared_bytes(weight) >= _MANY_ROWS_BYTES
    return tile.num_stages if has_room else min(tile.num_stages, 3)


def weighted_rows(
    scaled: Tensor,
    routing: Routing,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    tile: Tile,
    down_tile: Tile | None = None,
    wrap: Wrap = unwrapped,
) -> Tensor:
    """Both products, of rows times `ROW_FACTOR`, without the sum over a row's experts: weighted [N * k, D].

    Raises:
        ValueError: rows that are not bfloat16, weights that are not packed or not contiguous.
    """
    if scaled.dtype != torch.bfloat16:
        raise ValueError(f"experts_packed: got rows in {scaled.dtype}, expected torch.bfloat16, as packed weights are")
    check_weights("experts_packed", "packed", gate_up_proj, down_proj, scaled.shape[1])
    return products(scaled, routing, gate_up_proj, down_proj, ROW_FACTOR, tile, choose_down_tile(tile), down_tile, wrap)


def products(
    rows: Tensor,
    routing: Routing,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    factor: float,
    tile: Tile,
    usual_down_tile: Tile,
    down_tile: Tile | None,
    wrap: Wrap,
) -> Tensor:
    """`weighted_rows` of weights in any of the formats. factor: of the rows. down_tile: one to try; then, and where PyTorch
    traces, without the kernels for Hopper."""
    row_order, tile_expert, top_k_weights, num_experts, weighted = routing
    top_k, may_be_for_hopper = top_k_weights.shape[1], down_tile is None and wrap is unwrapped
    for_hopper = may_be_for_hopper and has_hopper_gate_up(rows, gate_up_proj, top_k, tile, num_experts)
    first = hopper_gate_up if for_hopper else gate_up
    (activated,) = first(rows, gate_up_proj, row_order, tile_expert, top_k, tile, factor).run(wrap)
    operands = (activated, down_proj, top_k_weights, row_order, tile_expert, rows.shape[1])
    if may_be_for_hopper and has_hopper_down(activated, rows.shape[1], tile):
        second = hopper_down(*operands, tile, weighted)
    else:
        second = down(*operands, down_tile or usual_down_tile, weighted=weighted)
    (result,) = second.run(wrap)
    return result
