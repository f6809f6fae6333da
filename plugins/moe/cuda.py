"""The CUDA path of the experts operator: its kernels, called directly or traced into a compiled program.

A compiler sees through `diffusiongemma::experts_triton`, not through `diffusiongemma::experts`, whose node must stay whole
for the targets that have an implementation of their own. So a program for CUDA is lowered after

    exported.run_decompositions(CUDA_DECOMPOSITIONS)

and its kernels are then compiled into the package. Import this module only where triton is installed; it needs neither a
GPU nor a CUDA build of PyTorch.
"""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op, wrap_triton

from plugins.library import LIBRARY
from plugins.moe import launch


@triton_op("diffusiongemma::experts_triton", mutates_args={})
def experts_triton(
    hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """As `experts`, open to compilers. A symbolic number of rows gets the tile for the fewest that it can be."""
    num_rows, top_k = least(hidden.shape[0]), top_k_index.shape[1]
    tile = launch.choose_tile(num_rows, top_k, gate_up_proj.shape[0], hidden.dtype)
    return launch.experts(hidden, top_k_index, top_k_weights, gate_up_proj, down_proj, tile=tile, wrap=wrap_triton)


def least(number: int | torch.SymInt) -> int:
    """The largest power of two that a number, symbolic or not, is known to reach; 1 where nothing is known."""
    bound = 1
    while bound < 1 << 20 and statically_known_true(number >= 2 * bound):
        bound *= 2
    return bound


LIBRARY.impl("experts", launch.experts, "CUDA")

CUDA_DECOMPOSITIONS = {torch.ops.diffusiongemma.experts.default: experts_triton}
