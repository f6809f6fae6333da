"""The standard streams of a command, which may be closed, full, or of an encoding that lacks what is printed."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_MODES = {"stdin": "r", "stdout": "w", "stderr": "w"}


@contextmanager
def standard_streams() -> Iterator[None]:
    """Around a command. One that is closed is empty, or leads nowhere: Python has none for it, and the next file that is opened
    would get its number. What an encoding lacks is printed as a question mark.

    An output that takes no more ends the command with status 1; in a line, but for a pipe whose reader has gone.
    """
    for name, mode in _MODES.items():  # in the order of their numbers, of which a file gets the first that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, for as long as the process
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # at the end of the process it would be too late to say so
    except OSError as error:
        if error.filename or error.errno not in (errno.ENOSPC, errno.EPIPE):  # of a file
            raise
        os.dup2(os.open(os.devnull, os.O_RDWR), sys.stdout.fileno())  # Python writes again what is left
        if error.errno == errno.ENOSPC:
            print(
                f"error: standard output: cannot be written ({error.strerror}); make room, or write elsewhere", file=sys.stderr
            )
        sys.exit(1)
