"""How steps and passes are timed on a GPU."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import triton.testing

from backend.captured_loop import CapturedLoop


def milliseconds(run: Callable[[], object]) -> float:
    """On the device, median."""
    return triton.testing.do_bench(run, return_mode="median")


def time_steps(loop: CapturedLoop, slots: Sequence[int], count: int) -> float:
    """Milliseconds of a step alone, median of `count`, after one that warms up."""
    each = []
    for _ in range(1 + count):
        torch.cuda.synchronize()
        started = time.perf_counter()
        loop.step(slots)
        torch.cuda.synchronize()
        each.append(1e3 * (time.perf_counter() - started))
    return statistics.median(each[1:])


def time_row(loop: CapturedLoop, slots: Sequence[int], count: int, start: Callable[[], object]) -> float:
    """Milliseconds of a step, `count` of them in a row: the median of three rows. start: gives the slots new canvases."""
    each = []
    for _ in range(3):
        start()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            loop.step(slots)
        torch.cuda.synchronize()
        each.append(1e3 * (time.perf_counter() - started) / count)
    return statistics.median(each)


def kernel_times(run: Callable[[], object]) -> list[tuple[str, float, float]]:
    """Name, launches and microseconds of each kernel of a run, the mean of three, longest first."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    rows = [(each.key[:90], each.count / 3, each.self_device_time_total / 3) for each in profiler.key_averages()]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
