"""The CUDA path of the operators: their kernels, called directly or traced into a compiled program.

A compiler sees through `diffusiongemma::experts_triton`, not through `diffusiongemma::experts`, whose node must stay whole
for the targets that have an implementation of their own; and so with `experts_fp8`. So a program for CUDA is lowered after

    exported.run_decompositions(CUDA_DECOMPOSITIONS)

and its kernels are then compiled into the package. Import this module only where triton is installed; it needs neither a
GPU nor a CUDA build of PyTorch.
"""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op, wrap_triton

from plugins.library import LIBRARY
from plugins.moe import fp8_launch, launch
from plugins.triton_launch import Wrap, unwrapped


@triton_op("diffusiongemma::experts_triton", mutates_args={})
def experts_triton(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """As `experts`, open to compilers. A symbolic number of rows gets the tile for the fewest that it can be."""
    num_rows, top_k = least(hidden.shape[0]), top_k_index.shape[1]
    tile = launch.choose_tile(num_rows, top_k, gate_up_proj.shape[0], hidden.dtype)
    return launch.experts(hidden, top_k_index, top_k_weights, gate_up_proj, down_proj, tile=tile, wrap=wrap_triton)


@triton_op("diffusiongemma::experts_fp8_triton", mutates_args={})
def experts_fp8_triton(
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_proj_scale: Tensor,
    down_proj: Tensor,
    down_proj_scale: Tensor,
    fp8_rows: bool,
) -> Tensor:
    """As `experts_fp8`, open to compilers. A symbolic number of rows gets the tile for the fewest that it can be."""
    num_rows, top_k = least(hidden.shape[0]), top_k_index.shape[1]
    tile = fp8_launch.choose_tile(num_rows, top_k, gate_up_proj.shape[0], hidden.dtype, fp8_rows)
    gate_up, down = (gate_up_proj, gate_up_proj_scale), (down_proj, down_proj_scale)
    return fp8_launch.experts_fp8(hidden, top_k_index, top_k_weights, *gate_up, *down, fp8_rows, tile=tile, wrap=wrap_triton)


@triton_op("diffusiongemma::choose_experts_triton", mutates_args={})
def choose_experts_triton(logits: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """As `choose_experts`, open to compilers; of equal logits the lower index comes first."""
    return choose_experts(logits, per_expert_scale, top_k, wrap=wrap_triton)


def choose_experts(logits: Tensor, per_expert_scale: Tensor, top_k: int, *, wrap: Wrap = unwrapped) -> tuple[Tensor, Tensor]:
    top_k_weights, top_k_index = launch.router(logits.contiguous(), per_expert_scale, top_k).run(wrap)
    return top_k_weights, top_k_index


def least(number: int | torch.SymInt) -> int:
    """The largest power of two that a number, symbolic or not, is known to reach; 1 where nothing is known."""
    bound = 1
    while bound < 1 << 20 and statically_known_true(number >= 2 * bound):
        bound *= 2
    return bound


LIBRARY.impl("experts", launch.experts, "CUDA")
LIBRARY.impl("experts_fp8", fp8_launch.experts_fp8, "CUDA")
LIBRARY.impl("choose_experts", choose_experts, "CUDA")

CUDA_DECOMPOSITIONS = {
    torch.ops.diffusiongemma.experts.default: experts_triton,
    torch.ops.diffusiongemma.experts_fp8.default: experts_fp8_triton,
    torch.ops.diffusiongemma.choose_experts.default: choose_experts_triton,
}
