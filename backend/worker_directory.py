"""A temporary directory for a worker, which unpacks its programs there and has no time to remove them when it is killed.

Its parent removes it. Where that was killed too, the next parent on this machine does: whoever lives has its directory locked,
and the kernel unlocks it when a process ends, however it does.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "diffusiongemma_worker_"


@contextmanager
def worker_directory() -> Iterator[Path]:
    """Raises OSError if there can be none."""
    _remove_left_behind()
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as path, _locked(Path(path), fcntl.LOCK_EX):
        yield Path(path)


def _remove_left_behind() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
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
