"""Waiting for what happens elsewhere, without a hang when it does not."""

import time
from collections.abc import Callable

TIMEOUT_S = 120  # only what hangs needs it


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(0.01)
