"""Tells how far a long load is: a bar on a terminal, a line every few seconds in a log. Bytes are those read from files."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Report = Callable[[str], None]
Advance = Callable[[int], None]
ShowProgress = Callable[[int], AbstractContextManager[Advance]]
"""The bytes to load → a context; call what it gives with the bytes of each piece, one call at a time."""

_REPORT_INTERVAL_S = 5.0
_LONG_S = 1.0  # what took less is not worth a line


def show_progress(total_bytes: int) -> AbstractContextManager[Advance]:
    """On standard error: a bar where that is a terminal, else lines."""
    console = Console(stderr=True)
    return bar(total_bytes, console) if console.is_terminal else lines(total_bytes)


@contextmanager
def bar(total_bytes: int, console: Console) -> Iterator[Advance]:
    """A bar with gigabytes, gigabytes a second and the time that is left; a line at the end of a long load."""
    columns = TextColumn("weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    started = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("weights", total=total_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)
    _tell_done(total_bytes, time.monotonic() - started, lambda line: console.print(line, highlight=False))


@contextmanager
def lines(total_bytes: int, report: Report | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[Advance]:
    """A line every five seconds, and one at the end of a long load, to `report` or to standard error."""
    report = report or (lambda line: print(line, file=sys.stderr, flush=True))
    started = reported = clock()
    loaded_bytes = 0

    def advance(num_bytes: int) -> None:
        nonlocal loaded_bytes, reported
        loaded_bytes += num_bytes
        now = clock()
        if now - reported >= _REPORT_INTERVAL_S:
            reported = now
            speed = loaded_bytes / (now - started)
            report(f"weights: {loaded_bytes / 1e9:.1f} of {total_bytes / 1e9:.1f} GB, {speed / 1e9:.2f} GB/s")

    yield advance
    _tell_done(total_bytes, clock() - started, report)


def _tell_done(total_bytes: int, seconds: float, report: Report) -> None:
    if seconds >= _LONG_S:
        report(f"weights: {total_bytes / 1e9:.2f} GB in {seconds:.1f} s, {total_bytes / seconds / 1e9:.2f} GB/s")
