"""The CUDA path of `feed_forward_spread`: each other GPU has a stream for its share, which a capture takes in as a branch."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from plugins.feed_forward.cuda import MANY_ROWS, beside
from plugins.feed_forward.launch import feed_forward
from plugins.feed_forward.spread import Spread
from plugins.feed_forward.spread_op import parts_of
from plugins.library import LIBRARY


def feed_forward_spread_cuda(*arguments) -> tuple[Tensor, Tensor]:
    """arguments: the operator's, in order."""
    *given, experts, num_gpus, top_k, eps, fp8_rows = arguments
    own, *others = parts_of(experts, num_gpus)
    few = given[0].shape[0] < MANY_ROWS
    return feed_forward(
        *given,
        own,
        top_k,
        eps,
        fp8_rows,
        start_mlp=partial(beside, priority=-1 if few else 0),
        mlp_first=few,
        take_rows=Spread(others=others, run_there=run_there),
    )


def run_there(device: torch.device, work: Callable[[], None]) -> Callable[[], None]:
    """See `plugins.feed_forward.spread.RunThere`. All work of a device is on one stream, so that the memory which one has used
    may be the next one's."""
    here, there = torch.cuda.current_stream(), _stream_of(device)
    there.wait_stream(here)
    with torch.cuda.stream(there):
        work()
    return lambda: here.wait_stream(there)


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


LIBRARY.impl("feed_forward_spread", feed_forward_spread_cuda, "CUDA")
