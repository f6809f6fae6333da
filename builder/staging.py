"""Directories that are written beside their place, and put there when they are finished."""

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from builder.errors import BuildError
from builder.existing import check_replaceable
from builder.paths import check_path
from contract.own_directory import own_directory

# Of Linux, <fcntl.h> and <stdio.h>.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def real_place(directory: Path) -> Path:
    """`directory` with links followed: what a link points to is written, and the link stays.

    Raises:
        BuildError: a file is there, or a link to itself; or see `check_path`.
    """
    check_path(directory)
    place = Path(os.path.realpath(directory))
    with writing(place):
        if os.path.lexists(place) and not place.is_dir():
            kind = "a link to itself" if place.is_symlink() else "a file"
            raise BuildError(f"{place}: is {kind}, expected a directory or a new name; choose another")
    return place


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Around what writes `place`, and nothing else: whatever the system refuses in the block is said to be the writing.

    Raises:
        BuildError: the block cannot write.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BuildError(f"{place}: cannot be written ({error}); make room or give access, or choose another place") from error


@contextmanager
def staged(engine: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary directory beside `engine` that takes its place when the block succeeds, and vanishes when it fails; that of
    a build which was killed vanishes with the next one.

    Raises:
        BuildError: `engine` is a mount point, or may not be replaced (`check_replaceable`), before the block or after it, or
            the directory cannot be made or put in place; what is there stays.
    """
    with ExitStack() as opened:
        with writing(engine):
            engine.parent.mkdir(parents=True, exist_ok=True)
            check_replaceable(engine, force=force)
            if os.path.ismount(engine):
                raise BuildError(
                    f"{engine}: is a mount point, whose place no other directory can take; choose a directory in it"
                )
            staging = opened.enter_context(own_directory(f".{engine.name}.building-", engine.parent))
            staging.chmod(0o755)
        yield staging
        with writing(engine):
            check_replaceable(engine, force=force)  # the block may have taken minutes
            _replace(engine, staging)


def _replace(engine: Path, staging: Path) -> None:
    """Puts `staging` where `engine` is; what was there is then at `staging`, or gone.

    In one step where the system can exchange two directories. Where it cannot (a network's file system, for one) in two
    renames, and what was there is put back if the second fails; between them it is `.<engine>.old.*/engine`.
    """
    if not engine.exists():
        os.replace(staging, engine)
        return
    if _exchanged(engine, staging):
        return
    old = Path(tempfile.mkdtemp(prefix=f".{engine.name}.old.", dir=engine.parent))
    try:
        os.replace(engine, old / "engine")
        os.replace(staging, engine)
    finally:
        if not engine.exists():
            os.replace(old / "engine", engine)
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(left: Path, right: Path) -> bool:
    """Whether the two have been exchanged; nothing has happened if not."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    places = (_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right))
    return exchange is not None and exchange(*places, _RENAME_EXCHANGE) == 0
