"""A build's processes. They begin with what is here, and import PyTorch with what they are given to do."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from tqdm import tqdm

from builder.errors import BuildError
from contract.end_with_parent import end_with


@contextmanager
def processes(at_once: int) -> Iterator[ProcessPoolExecutor]:
    """They end with the block, whatever ends it. Raises BuildError if one of them was ended from outside."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(at_once, context, initializer=_begin, initargs=(os.getpid(),)) as pool:
        try:
            with _interrupts_held_back():
                pool.submit(int)  # starts all of them
            yield pool
        except BrokenProcessPool:
            raise BuildError(
                "compiling: a process was ended from outside, most likely because memory was short; free some, or build with "
                "fewer cores (taskset --cpu-list 0 …), of which each takes a gigabyte"
            ) from None
        except BaseException:  # an error, or a signal: leaving the block would wait for the other programs
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _begin(parent: int) -> None:
    end_with(parent)
    # PyTorch counts with tqdm, whose own lock is for several processes: Python warns of those that one leaves when it is ended.
    tqdm.set_lock(threading.RLock())


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes that are started in the block never get SIGINT, which a terminal sends to all of its processes; this one gets
    what came meanwhile when the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
