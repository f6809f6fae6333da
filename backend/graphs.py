"""CUDA graphs of what a loop does again and again."""

from collections.abc import Callable

import torch


class Graphs:
    """They share one pool of memory: they run one after the other, and nothing in it outlives a step."""

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()

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
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                part()
            replays.append(graph.replay)
        return replays
