"""Temporary directories of one process, which has no time to remove them when it is killed.

The next process that makes one removes those: whoever lives has its directory locked, and the kernel unlocks it when a process
ends, however it does.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def own_directory(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new one in `parent`, or where temporary files go. `prefix`: of its name, and of no other directory's there.

    Raises OSError if there can be none. Where the file system has no locks, none is removed for another process.
    """
    parent = parent or Path(tempfile.gettempdir())
    _remove_left_behind(parent, prefix)
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with ExitStack() as opened:
            with suppress(OSError):
                opened.enter_context(_locked(path, fcntl.LOCK_EX))
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_left_behind(parent: Path, prefix: str) -> None:
    for path in [each for each in parent.iterdir() if each.name.startswith(prefix)]:
        # Locked by one that lives, another user's, or just removed by somebody else.
        with suppress(OSError), _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if any(path.iterdir()):  # an empty one may be new, and about to be locked
                shutil.rmtree(path)


@contextmanager
def _locked(path: Path, operation: int) -> Iterator[None]:
    """Raises OSError for what is no directory, a link to one included."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(directory, operation)
        yield
    finally:
        os.close(directory)
