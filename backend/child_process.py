"""Children of this process: how they ended, and such that end when it does, however it ends.

`python -m backend.child_process PARENT COMMAND...` becomes the command, which need not know of it.
`python -m backend.child_process GROUP` ends a group of processes when its standard input ends.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from contract.end_with_parent import end_with


def ending_with_this_process(command: Sequence[str]) -> list[str]:
    """For a child that can import this package. It ends with the thread that starts it."""
    return [sys.executable, "-m", "backend.child_process", str(os.getpid()), *command]


def how_ended(code: int) -> str:
    """In words, from the return code of a child."""
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


class GroupGuard:
    """Ends a group of processes with this process: the kernel would end its first one alone, and a stub of Triton's whose
    server is gone waits for it at times."""

    def __init__(self, group: int, environment: dict[str, str]):
        """environment: with which this package can be imported."""
        command = [sys.executable, "-m", "backend.child_process", str(group)]
        here = Path(__file__).resolve().parents[1]  # not where this process runs: there may be another package of this name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd=here, start_new_session=True)

    def close(self) -> None:
        """The group has ended, and its number may be anybody's."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()


def _guard(group: int) -> None:
    sys.stdin.read()
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[2:]:
        end_with(int(sys.argv[1]))
        os.execv(sys.argv[2], sys.argv[2:])
    _guard(int(sys.argv[1]))
