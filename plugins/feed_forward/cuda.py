"""The CUDA path of the feed-forward operator: called as a whole, its MLP beside its experts, or traced into a program.

A compiled program runs on one stream. A program that is captured in a CUDA graph calls the operator, whose streams become
branches of the graph, at no cost when it is replayed; in one that is not, the operator is opened, so that its launches cost no
Python (see `plugins.attention.cuda`).
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.library import triton_op, wrap_triton

from plugins.feed_forward.launch import choose_tile, feed_forward
from plugins.feed_forward.mlp_launch import mlp_beside
from plugins.library import LIBRARY


def beside(rows: Tensor, gate_up: Tensor, down: Tensor) -> Callable[[], Tensor]:
    """Starts the MLP on another stream of the current device; its result may be used on the current one once it is asked for.

    The other stream goes first: what runs there is short, and the experts' programs fill the device for long.
    """
    here = torch.cuda.current_stream()
    there = _other_stream(here.device)
    there.wait_stream(here)
    with torch.cuda.stream(there):
        result = mlp_beside(rows, gate_up, down)

    def wait() -> Tensor:
        # The result's memory is given back to `there`, which writes to it again only after its next `wait_stream`.
        here.wait_stream(there)
        return result

    return wait


@cache
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    """One for a device: libraries keep workspaces for each stream."""
    return torch.cuda.Stream(device, priority=-1)


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
    tile = choose_tile(least(hidden.shape[0]), top_k, experts, hidden.dtype, fp8_rows)
    weights = (norms, scalar, dense, router, experts)
    return feed_forward(hidden, attended, *weights, top_k, eps, fp8_rows, tile=tile, wrap=wrap_triton)


def least(number: int | torch.SymInt) -> int:
    """The largest power of two that a number, symbolic or not, is known to reach; 1 where nothing is known."""
    bound = 1
    while bound < 1 << 20 and statically_known_true(number >= 2 * bound):
        bound *= 2
    return bound


LIBRARY.impl("feed_forward", partial(feed_forward, start_mlp=beside), "CUDA")

CUDA_DECOMPOSITIONS = {torch.ops.diffusiongemma.feed_forward.default: feed_forward_triton}
