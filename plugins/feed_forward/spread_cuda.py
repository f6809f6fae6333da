"""The CUDA path of `feed_forward_spread`: each other GPU has a stream for its share, which a capture takes in as a branch."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from plugins.feed_forward.cuda import feed_forward_cuda
from plugins.feed_forward.spread import Spread
from plugins.feed_forward.spread_op import parts_of
from plugins.library import LIBRARY


def feed_forward_spread_cuda(*arguments) -> tuple[Tensor, Tensor]:
    """arguments: the operator's, in order."""
    *given, experts, num_gpus, top_k, eps, fp8_rows = arguments
    own, *others = parts_of(experts, num_gpus)
    return feed_forward_cuda(*given, own, top_k, eps, fp8_rows, take_rows=Spread(others=others, run_there=run_there))


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
