"""The CUDA path of the feed-forward operator, called as a whole: its MLP beside its experts.

A compiled program runs on one stream. A program that is captured in a CUDA graph calls the operator, whose streams become
branches of the graph, at no cost when it is replayed; in one that is not, the operator is opened, so that its launches cost no
Python (see `plugins.attention.opened`).
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from plugins.feed_forward.launch import TakeRows, feed_forward, in_one_place
from plugins.feed_forward.mlp_launch import mlp_beside
from plugins.library import LIBRARY

MANY_ROWS = 1024
"""From here on the MLP is started when the experts' rows are in order, and has no priority; else the small kernels of the
router wait for its products, which fill the device. NVIDIA H200, Triton 3.6, FP8 rows, the operator at 1024 / 2048 / 4096 /
8192 / 16384 rows: 445 / 695 / 1234 / 2425 / 4636 µs; with priority: 448 / 712 / 1298 / 2426 / 4600; before the router, with
priority: 455 / 741 / 1298 / 2449 / 4739; in turn: 462 / 727 / 1315 / 2480 / 4647. At 256 / 512 rows 248 / 312; before the
router, with priority: 241 / 311."""


def feed_forward_cuda(hidden: Tensor, *others, take_rows: TakeRows = in_one_place) -> tuple[Tensor, Tensor]:
    """As `feed_forward`, the MLP beside the experts. others: the operator's, in order."""
    few = hidden.shape[0] < MANY_ROWS
    start_mlp = partial(beside, priority=-1 if few else 0)
    return feed_forward(hidden, *others, start_mlp=start_mlp, mlp_first=few, take_rows=take_rows)


def beside(rows: Tensor, gate_up: Tensor, down: Tensor, priority: int) -> Callable[[], Tensor]:
    """Starts the MLP on another stream of the current device; its result may be used on the current one once it is asked for.

    priority: -1, and the other stream goes first: of few rows what runs there is short, and the experts' programs fill the
    device for long. 0, and the streams are equals.
    """
    here = torch.cuda.current_stream()
    there = _other_stream(here.device, priority)
    there.wait_stream(here)
    with torch.cuda.stream(there):
        result = mlp_beside(rows, gate_up, down)

    def wait() -> Tensor:
        # The result's memory is given back to `there`, which writes to it again only after its next `wait_stream`.
        here.wait_stream(there)
        return result

    return wait


@cache
def _other_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    """One for a device and a priority: libraries keep workspaces for each stream."""
    return torch.cuda.Stream(device, priority=priority)


LIBRARY.impl("feed_forward", feed_forward_cuda, "CUDA")
