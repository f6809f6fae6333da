"""How each kernel of the mixture of experts is launched: arguments, grid, tile and scratch.

The whole operator, `plugins.moe.kinds.experts`: align, gate_up, down, combine; before it the router. See the package for its
arguments and `plugins.moe.kernel` for the shape legend and the kernels. Everything here works on CUDA tensors, on meta tensors
(to describe and compile), and on CPU tensors in Triton's interpreter.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from plugins.moe import kernel
from plugins.moe.alignment import aligned
from plugins.triton_launch import Launch, Wrap, ceil_div, least, unwrapped


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program of a grouped product reads, and how it is pipelined: `rows` routed rows and `width` rows of the
    expert's weight, `depth` columns of both at a time. Of gate_up's weight rows half are gate rows and half are up rows.
    weights_first: weights times rows, not rows times weights; wgmma takes 64 rows of its first factor, and 8 of its second.
    """

    rows: int
    width: int
    depth: int
    num_warps: int
    num_stages: int
    weights_first: bool = False


FEW_ROWS = Tile(rows=32, width=128, depth=64, num_warps=4, num_stages=3, weights_first=True)
"""NVIDIA H200, Triton 3.6, the operator at 256 rows: 373 µs; 4 stages: 376; not weights_first, 4 stages: 382; width 256, 8
warps: 381; 64 rows: 379. gate_up + down alone: 235 + 128; 16 rows: 257 + 134; 32 x 64 x 128, not weights_first: 246 + 133."""

SOME_ROWS = Tile(rows=64, width=128, depth=64, num_warps=4, num_stages=3)
"""NVIDIA H200, Triton 3.6, the operator at 512 / 1024 rows: 395 / 464 µs; 4 stages: 399 / 461; weights_first: 398 / 466;
FEW_ROWS at 512: 424; MANY_ROWS in both products: 446 / 472; 128 x 256 in both, 4 stages: 423 / 448."""

MANY_ROWS = Tile(rows=128, width=128, depth=64, num_warps=8, num_stages=3)
"""NVIDIA H200, Triton 3.6, gate_up at 8192 rows: 1007 µs; 4 warps: 1050; weights_first: 1124; 4 stages: 1196; width 256:
1054; 256 rows: 1075; 64 rows: 1287. At 2048 rows: 358; 64 rows: 382."""

MANY_ROWS_DOWN = Tile(rows=128, width=256, depth=64, num_warps=8, num_stages=3)
"""NVIDIA H200, Triton 3.6, 8192 rows: down 577 µs; width 128: 654; 4 stages: 607; weights_first: 690."""

FLOAT32 = Tile(rows=32, width=64, depth=32, num_warps=4, num_stages=2)
"""For comparisons in float32, without tensor cores: small enough for the registers. Not meant to be quick."""


ROUTER_ROWS, ROUTER_PART = 64, 256
"""Of the router's product: rows of a program, and columns of a part, which is a sum of its own. NVIDIA H200, Triton 3.6, with
the choice of experts, at 256 / 1,024 / 2,048 rows: 6.2 / 8.7 / 11.9 µs, with the library's product 8.3 / 9.3 / 10.5; 32 rows:
6.7 / 9.7 / 15.7; 128 rows: 8.8 / 9.8 / 13.4; parts of 512: 7.6 / 8.5 / 11.4."""

ROUTER_MANY_ROWS = 4096
"""From so many rows on two programs share a row, each with half of its columns; below as many as there are parts."""


def choose_tile(num_rows: int, top_k: int, num_experts: int, dtype: torch.dtype) -> Tile:
    """The tile for `num_rows` rows; a number that is symbolic, because a program is being traced, gets the few rows' tile."""
    if dtype == torch.float32:
        return FLOAT32
    if not isinstance(num_rows, int):
        return FEW_ROWS
    return by_rows_of_an_expert(num_rows * top_k // num_experts, FEW_ROWS, SOME_ROWS, MANY_ROWS)


def by_rows_of_an_expert(rows: int, few: Tile, some: Tile, many: Tile) -> Tile:
    """Of three tiles the one that is filled by the rows that an expert gets, evenly spread."""
    return many if rows >= 128 else some if rows >= 32 else few


def choose_down_tile(tile: Tile) -> Tile:
    """The tile of the second product, next to that of the first; they have the same rows."""
    return MANY_ROWS_DOWN if tile == MANY_ROWS else tile


def router_logits(rows: Tensor, projection: Tensor) -> Launch:
    """rows [N, D], projection [E, D] of the same dtype. Outputs parts [P, N, E] float32 for `router`."""
    (num_rows, hidden_size), num_experts = rows.shape, projection.shape[0]
    num_parts = ceil_div(hidden_size, ROUTER_PART)
    of_program = ceil_div(num_parts, 2) if least(num_rows) >= ROUTER_MANY_ROWS else 1
    sharing = ceil_div(num_parts, of_program)
    return Launch(
        kernel=kernel.router_logits_kernel,
        grid=(ceil_div(num_rows, ROUTER_ROWS), sharing),
        inputs=(rows, projection),
        scalars=(num_rows,),
        outputs=(rows.new_empty(sharing, num_rows, num_experts, dtype=torch.float32),),
        constants={
            "HIDDEN": hidden_size,
            "NUM_EXPERTS": num_experts,
            "EXPERTS_POW2": max(triton.next_power_of_2(num_experts), 16),
            "ROWS": ROUTER_ROWS,
            "PART": ROUTER_PART,
            "DEPTH": 64 if rows.dtype == torch.bfloat16 else 32,
            "NUM_PARTS": of_program,
        },
        num_warps=4,
        num_stages=3,
    )


def router(logits: Tensor, per_expert_scale: Tensor, top_k: int, dtype: torch.dtype | None = None) -> Launch:
    """logits [N, E]; or the parts of them [P, N, E] float32, and `dtype`, to which their sums are rounded. Outputs
    top_k_weights [N, k] float32 and top_k_index [N, k] int64."""
    *parts, num_rows, num_experts = logits.shape
    num_warps = 4
    return Launch(
        kernel=kernel.router_kernel,
        grid=(ceil_div(num_rows, num_warps),),
        inputs=(logits, per_expert_scale),
        scalars=(num_rows,),
        outputs=(
            logits.new_empty(num_rows, top_k, dtype=torch.float32),
            logits.new_empty(num_rows, top_k, dtype=torch.int64),
        ),
        constants={
            "NUM_EXPERTS": num_experts,
            "TOP_K": top_k,
            "ROWS": num_warps,  # a row for each warp, so that no reduction crosses warps
            "EXPERTS_POW2": triton.next_power_of_2(num_experts),
            "TOP_K_POW2": triton.next_power_of_2(top_k),
            "NUM_PARTS": parts[0] if parts else 1,
            "BFLOAT16": dtype == torch.bfloat16,
        },
        num_warps=num_warps,
        num_stages=1,
    )


def gate_up(hidden: Tensor, gate_up_proj: Tensor, row_order: Tensor, tile_expert: Tensor, top_k: int, tile: Tile) -> Launch:
    """Outputs activated [N * k, F] in the dtype of `hidden`."""
    num_rows, hidden_size = hidden.shape
    width, tile_width = gate_up_proj.shape[1] // 2, tile.width // 2
    return Launch(
        kernel=kernel.gate_up_kernel,
        grid=(ceil_div(width, tile_width), tile_expert.shape[0]),
        inputs=(hidden, gate_up_proj, row_order, tile_expert),
        scalars=(num_rows * top_k,),
        outputs=(hidden.new_empty(num_rows * top_k, width),),
        constants={"NUM_EXPERTS": gate_up_proj.shape[0], "HIDDEN": hidden_size, "WIDTH": width, "TOP_K": top_k}
        | tile_constants(tile, tile_width),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def down(
    activated: Tensor,
    down_proj: Tensor,
    top_k_weights: Tensor,
    row_order: Tensor,
    tile_expert: Tensor,
    tile: Tile,
    weighted: Tensor | None = None,
) -> Launch:
    """Outputs weighted [N * k, D] in the dtype of `activated`: the one that is given, or a new one.

    The model's dtype and not float32: a routed row is rounded once, as on the CPU path, and takes half the bytes (0.74 and
    not 1.48 GB, written and read, at 16,384 rows). The sum over a row's experts is in float32.
    """
    num_routed, width = activated.shape
    hidden_size = down_proj.shape[1]
    return Launch(
        kernel=kernel.down_kernel,
        grid=(ceil_div(hidden_size, tile.width), tile_expert.shape[0]),
        inputs=(activated, down_proj, top_k_weights, row_order, tile_expert),
        scalars=(num_routed,),
        outputs=(activated.new_empty(num_routed, hidden_size) if weighted is None else weighted,),
        constants={"NUM_EXPERTS": down_proj.shape[0], "HIDDEN": hidden_size, "WIDTH": width} | tile_constants(tile, tile.width),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def combine(weighted: Tensor, top_k: int) -> Launch:
    """Outputs [N, D] in the dtype of `weighted`."""
    num_routed, hidden_size = weighted.shape
    num_rows, block = num_routed // top_k, min(1024, triton.next_power_of_2(hidden_size))
    return Launch(
        kernel=kernel.combine_kernel,
        grid=(num_rows, ceil_div(hidden_size, block)),
        inputs=(weighted,),
        scalars=(),
        outputs=(weighted.new_empty(num_rows, hidden_size),),
        constants={"HIDDEN": hidden_size, "TOP_K": top_k, "BLOCK": block},
        num_warps=4,
        num_stages=1,
    )


class Routing(NamedTuple):
    """Which rows go to which expert, in tiles (see `plugins.moe.alignment`), with what weights [N, k].

    num_experts: of the layer. weighted: where the results go, [N * k, D], in which routed rows of experts that are elsewhere
    stay as they are; None makes it.
    """

    row_order: Tensor
    tile_expert: Tensor
    top_k_weights: Tensor
    num_experts: int
    weighted: Tensor | None


def route(
    top_k_index: Tensor,
    top_k_weights: Tensor,
    num_experts: int,
    tile: Tile,
    wrap: Wrap = unwrapped,
    *,
    num_elsewhere: int = 0,
    weighted: Tensor | None = None,
) -> Routing:
    """Of what the router chose; `tile` is that of the products. An index that is none of `num_experts` is left out:
    `num_elsewhere` experts of the layer are on other devices."""
    order = aligned(top_k_index.contiguous(), num_experts, tile.rows, wrap)
    return Routing(*order, top_k_weights.contiguous(), num_experts + num_elsewhere, weighted)


def weighted_rows(
    hidden: Tensor,
    routing: Routing,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    tile: Tile,
    down_tile: Tile | None = None,
    wrap: Wrap = unwrapped,
) -> Tensor:
    """Both products, without the sum over a row's experts: weighted [N * k, D], as `combine` takes it.

    Raises:
        ValueError: the weights are not of the dtype of `hidden`, or not contiguous (to copy them here would cost as much
            as the products).
    """
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if weight.dtype != hidden.dtype:
            raise ValueError(f"experts: {name} is {weight.dtype}, hidden is {hidden.dtype}; convert one when it is loaded")
        if not weight.is_contiguous():
            raise ValueError(f"experts: {name} has strides {tuple(weight.stride())}; make it contiguous when it is loaded")
    row_order, tile_expert, top_k_weights, _, weighted = routing
    (activated,) = gate_up(hidden.contiguous(), gate_up_proj, row_order, tile_expert, top_k_weights.shape[1], tile).run(wrap)
    down_tile = down_tile or choose_down_tile(tile)
    (result,) = down(activated, down_proj, top_k_weights, row_order, tile_expert, down_tile, weighted).run(wrap)
    return result


def tile_constants(tile: Tile, tile_width: int) -> dict[str, int]:
    """The constants of the kernels of both products."""
    return {"TILE_ROWS": tile.rows, "TILE_WIDTH": tile_width, "TILE_DEPTH": tile.depth, "WEIGHTS_FIRST": tile.weights_first}
