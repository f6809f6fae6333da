"""The mixture of experts as TensorRT plugins: one a kernel, chained through outputs that serve as scratch.

    row_order, tile_expert = ExpertsAlign(top_k_index)
    activated = ExpertsGateUp(hidden, gate_up_proj, row_order, tile_expert)
    weighted = ExpertsDown(activated, down_proj, top_k_weights, row_order, tile_expert)
    output = ExpertsCombine(weighted)

The kernels agree on the tile's rows, so a tile is an attribute of their nodes, chosen once a program: TensorRT evaluates
grids and sizes for the shapes of a call, but a kernel's constants are fixed when the plan is built. See
`plugins.moe.kernel` for shapes.
"""

from dataclasses import asdict, fields

import torch
from torch import Tensor

from plugins.moe import alignment, launch
from plugins.moe.launch import Tile
from plugins.tensorrt_plugin import KernelPlugin, Output
from plugins.triton_launch import Launch

_TILE = tuple(field.name for field in fields(Tile))


def tile_attributes(tile: Tile) -> dict[str, int]:
    """The tile as attributes of the nodes of the two products."""
    return {name: int(value) for name, value in asdict(tile).items()}


def _align(inputs: tuple[Tensor, ...], *, num_experts: int, rows: int) -> Launch:
    (top_k_index,) = inputs
    return alignment.align(top_k_index, num_experts, rows)


def _gate_up(inputs: tuple[Tensor, ...], *, top_k: int, **tile: int) -> Launch:
    return launch.gate_up(*inputs, top_k, Tile(**tile))


def _down(inputs: tuple[Tensor, ...], **tile: int) -> Launch:
    return launch.down(*inputs, Tile(**tile))


def _combine(inputs: tuple[Tensor, ...], *, top_k: int) -> Launch:
    (weighted,) = inputs
    return launch.combine(weighted, top_k)


ALIGN = KernelPlugin(
    op_type="ExpertsAlign",
    inputs=("top_k_index",),
    attributes=("num_experts", "rows"),
    outputs=(Output(name="row_order", rank=1, dtype=torch.int32), Output(name="tile_expert", rank=1, dtype=torch.int32)),
    describe=_align,
)
GATE_UP = KernelPlugin(
    op_type="ExpertsGateUp",
    inputs=("hidden", "gate_up_proj", "row_order", "tile_expert"),
    attributes=("top_k", *_TILE),
    outputs=(Output(name="activated", rank=2, dtype="hidden"),),
    describe=_gate_up,
)
DOWN = KernelPlugin(
    op_type="ExpertsDown",
    inputs=("activated", "down_proj", "top_k_weights", "row_order", "tile_expert"),
    attributes=_TILE,
    outputs=(Output(name="weighted", rank=2, dtype="activated"),),
    describe=_down,
)
COMBINE = KernelPlugin(
    op_type="ExpertsCombine",
    inputs=("weighted",),
    attributes=("top_k",),
    outputs=(Output(name="output", rank=2, dtype="weighted"),),
    describe=_combine,
)
EXPERTS = (ALIGN, GATE_UP, DOWN, COMBINE)
