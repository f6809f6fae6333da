"""Directories that are written beside their place, and put there in one rename when they are finished."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from builder.errors import BuildError
from builder.existing import check_replaceable


def real_place(directory: Path) -> Path:
    """`directory` with links followed: what a link points to is written, and the link stays.

    Raises:
        BuildError: a file is there.
    """
    place = Path(os.path.realpath(directory))
    with writing(place):
        if place.exists() and not place.is_dir():
            raise BuildError(f"{place}: is a file, expected a directory or a new name; choose another")
    return place


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """
    Raises:
        BuildError: the block cannot write, or read what it writes from.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BuildError(f"{place}: cannot be written ({error}); make room or give access, or choose another place") from error


@contextmanager
def staged(engine: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary directory beside `engine` that takes its place when the block succeeds, and vanishes when it fails.

    Raises:
        BuildError: `engine` may not be replaced (`check_replaceable`), or something cannot be written; what is there stays.
    """
    with writing(engine):
        engine.parent.mkdir(parents=True, exist_ok=True)
        check_replaceable(engine, force=force)
        staging = Path(tempfile.mkdtemp(prefix=f".{engine.name}.", dir=engine.parent))
        try:
            staging.chmod(0o755)
            yield staging
            _replace(engine, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _replace(engine: Path, staging: Path) -> None:
    """Puts `staging` where `engine` is, or puts back what was there."""
    if not engine.exists():
        os.replace(staging, engine)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{engine.name}.old.", dir=engine.parent))
    try:
        os.replace(engine, old / "engine")
        os.replace(staging, engine)
    finally:
        if not engine.exists():
            os.replace(old / "engine", engine)
        shutil.rmtree(old)
