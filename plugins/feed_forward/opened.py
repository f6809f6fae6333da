"""The feed-forward operator, open to compilers; see `plugins.attention.opened`."""

from collections.abc import Sequence

from torch import Tensor
from torch.library import triton_op, wrap_triton

from plugins.feed_forward import launch
from plugins.feed_forward.op import feed_forward
from plugins.triton_launch import least


@triton_op("diffusiongemma::feed_forward_triton", mutates_args={})
def feed_forward_triton(
    hidden: Tensor,
    attended: Tensor,
    norms: Sequence[Tensor],
    scalar: Tensor,
    dense: Sequence[Tensor],
    router: Sequence[Tensor],
    experts: Sequence[Tensor],
    top_k: int,
    eps: float,
    fp8_rows: bool,
) -> tuple[Tensor, Tensor]:
    """As `feed_forward`, open to compilers. A symbolic number of rows gets the tile for the fewest that it can be."""
    tile = launch.choose_tile(least(hidden.shape[0]), top_k, experts, hidden.dtype, fp8_rows)
    weights = (norms, scalar, dense, router, experts)
    return launch.feed_forward(hidden, attended, *weights, top_k, eps, fp8_rows, tile=tile, wrap=wrap_triton)


CUDA_DECOMPOSITIONS = {feed_forward: feed_forward_triton}
