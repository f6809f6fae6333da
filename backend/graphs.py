"""CUDA graphs of what a loop does again and again."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch


class Graphs:
    """They share one pool of memory: they run one after the other, and nothing in it outlives a step."""

    def __init__(self, num_gpus: int = 1):
        """num_gpus: GPUs that have a part in what is captured, the current one and those after it."""
        self._pool = torch.cuda.graph_pool_handle()
        # A capture has a pool of the current GPU alone.
        self._others = {device: _pool_on(device) for device in (torch.device("cuda", number) for number in range(1, num_gpus))}

    def captured(self, *parts: Callable[[], object]) -> list[Callable[[], object]]:
        """What replays each of the parts, on the current stream. They run once before, one after the other, so that kernels are
        loaded and libraries have their workspaces."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for part in parts:
                part()
        torch.cuda.current_stream().wait_stream(stream)
        stream.synchronize()
        replays = []
        for part in parts:
            graph = torch.cuda.CUDAGraph()
            with ExitStack() as pools:
                for device, pool in self._others.items():
                    pools.enter_context(torch.cuda.use_mem_pool(pool, device))
                with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                    part()
            replays.append(partial(self._replay, graph))
        return replays

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        graph.replay()  # and whoever may call this has the pools, without which it would write to memory of others


def _pool_on(device: torch.device) -> torch.cuda.MemPool:
    """One lives as long as the object only on the GPU that is the current one when it is made."""
    with torch.cuda.device(device):
        return torch.cuda.MemPool()
