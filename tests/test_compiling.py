"""A build's processes: they end with it, and it ends with them."""

import multiprocessing
import os
import signal
import time

import pytest
from waiting import wait_until

from builder.compiling import processes
from builder.errors import BuildError


def started(count: int) -> list[multiprocessing.Process]:
    """This process's children, once there are so many."""
    wait_until(lambda: len(multiprocessing.active_children()) == count)
    return multiprocessing.active_children()


@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt, ValueError])
def test_processes_end_with_the_build(stop):
    with pytest.raises(stop), processes(2) as pool:
        for _ in range(3):
            pool.submit(time.sleep, 600)
        started(2)
        raise stop
    assert multiprocessing.active_children() == []


def test_a_process_that_is_ended_ends_the_build_in_one_line():
    with pytest.raises(BuildError) as refused, processes(2) as pool:
        running = pool.submit(time.sleep, 600)
        pool.submit(int).result()  # by now both are watched
        os.kill(started(2)[0].pid, signal.SIGKILL)
        running.result()
    assert str(refused.value).startswith("compiling: a process was ended from outside, most likely because memory was short;")
    assert multiprocessing.active_children() == []


def test_interrupts_are_the_builders():
    """A terminal sends them to all of its processes."""
    with processes(1) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
