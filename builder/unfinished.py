"""The directory that `quantize` and `merge` collect files in, beside their place, until all are there. A run that is cut off
leaves it, and the next one keeps the files that are whole.

A file gets its name when its content is on the disk, and so does the directory: a power cut leaves no half of either.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from builder.errors import BuildError
from builder.staging import writing
from builder.weights import Shapes

SOURCE = "source.json"
"""In the directory, until it is finished: what its files are made from."""


@contextmanager
def unfinished(place: Path, source: bytes) -> Iterator["Unfinished"]:
    """The directory for an output at `place`, for this process alone; what was made from another `source` is removed.

    Raises:
        BuildError: another run is writing the output, it is there already, or nothing can be written there.
    """
    directory = place.parent / f".{place.name}.unfinished"
    with writing(place):
        directory.mkdir(parents=True, exist_ok=True)
        opened = os.open(directory, os.O_RDONLY)
    try:
        with writing(place):
            _lock(opened, place)
            check_is_new(place)  # the run that had the lock may have put it there
            _begin(directory, source)
        yield Unfinished(place, directory)
    finally:
        os.close(opened)


class Unfinished:
    """See `unfinished`. Its methods raise BuildError where something cannot be written."""

    def __init__(self, place: Path, directory: Path):
        self.place, self.directory = place, directory

    def metadata(self, name: str, shapes: Shapes) -> dict[str, str] | None:
        """That of a file which is there; None where none is, or one that is not whole or has other tensors than `shapes`."""
        try:
            with safe_open(self.directory / name, framework="pt") as file:
                names = file.keys()
                found = {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in names}
                return file.metadata() if found == shapes else None
        except (OSError, SafetensorError):
            return None

    def save(self, name: str, content: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """A file of tensors."""
        half = self.directory / f"{name}.writing"
        with writing(self.place):
            save_file(content, half, metadata)
            half.chmod(0o644)  # safetensors gives access to the owner alone
            _to_disk(half)
            os.replace(half, self.directory / name)

    def add(self, files: dict[str, bytes]) -> None:
        """Small files, which are written anew by every run."""
        with writing(self.place):
            for name, content in files.items():
                (self.directory / name).write_bytes(content)

    def put_in_place(self) -> None:
        with writing(self.place):
            for leftover in self.directory.glob("*.writing"):
                leftover.unlink()
            for path in (*self.directory.iterdir(), self.directory):
                _to_disk(path)
            os.replace(self.directory, self.place)
            (self.place / SOURCE).unlink()  # not before: without it the next run would keep nothing
            for path in (self.place, self.place.parent):
                _to_disk(path)


def check_is_new(place: Path) -> None:
    """
    Raises:
        BuildError: `place` is there.
    """
    if place.exists():
        raise BuildError(f"{place}: is there already; expected a new directory, remove it or choose another")


def _lock(opened: int, place: Path) -> None:
    """The lock ends with this process, however it ends."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BuildError(f"{place}: is being written by another run; wait for it, or choose another place") from None


def _begin(directory: Path, source: bytes) -> None:
    record = directory / SOURCE
    if record.exists() and record.read_bytes() == source:
        return
    for each in directory.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    _to_disk(directory)  # before the new record, which would vouch for what is left of them
    record.write_bytes(source)
    _to_disk(record)


def _to_disk(path: Path) -> None:
    """What is in a file or directory."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
