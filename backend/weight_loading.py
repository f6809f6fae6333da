"""Reads tensors of a checkpoint to where they are used: each byte once, in the order of the files, by several readers.

    files ──▶ reader 1 ──▶ its lane ──▶
          ──▶ reader 2 ──▶ its lane ──▶ targets, in host memory or on a GPU (`weight_lanes`)

1. What is wanted is cut into pieces of whole slices along a tensor's first axis, so that a transform sees rows, never half of
   one.
2. Each reader takes the next piece, reads it into the memory that its lane gives, and has the lane deliver it; a lane to a GPU
   copies while its reader reads on.
3. When all pieces are delivered, every target is complete.

Files are read, not mapped: a file that ends too early is an error, where touching a mapping of it would end the process.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from contract.checkpoint import CheckpointError, Extent
from contract.regular_file import regular

Transform = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
"""Slices of a tensor as they are stored, and the dtype that they are bound in → the same slices as they are bound. Runs on the
target's device."""


class Reading(NamedTuple):
    """How many read at once, and the most that one reads at once, where one slice is not more."""

    num_readers: int
    piece_bytes: int


def reading(device_type: str) -> Reading:
    """For targets on such a device: a reader a core that this process may use, up to a number.

    Host: on two EPYC cores, page cache to memory, pieces of 4 and 16 MiB 4.4 GB/s, 1 MiB 4.0.
    GPU: to have a piece of experts packed takes 3 ms of Python, of one reader at a time. 51.65 GB to an NVIDIA H200, 32 cores,
    seconds and GB of the GPU that transforms take meanwhile: 8 readers of 16 MiB 7.9 and 2.8, of 32 MiB 4.0 and 5.2; 4 of
    16 MiB 5.1 and 1.5, of 32 MiB 4.0 and 2.7, of 64 MiB 4.2 and 5.1; 2 of 64 MiB 6.4 and 2.6.
    """
    most, piece_bytes = (4, 32 << 20) if device_type == "cuda" else (8, 16 << 20)
    return Reading(min(most, len(os.sched_getaffinity(0))), piece_bytes)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A tensor to load. `target`: contiguous, the first axis as stored. transform: None leaves the bytes as they are."""

    extent: Extent
    stored: torch.dtype
    target: torch.Tensor
    transform: Transform | None = None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """`num_bytes` bytes from `offset` on in `path`, of `shape` and in the dtype `stored`, are to become `target`."""

    path: Path
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    stored: torch.dtype
    target: torch.Tensor
    transform: Transform | None

    def as_stored(self, data: torch.Tensor) -> torch.Tensor:
        """What [num_bytes] uint8 hold."""
        return data.view(self.stored).view(self.shape)


class Lane(Protocol):
    """One reader's way to the targets; belongs to the reader's thread."""

    def buffer(self, piece: Piece) -> torch.Tensor:
        """Host memory to read the piece into, [num_bytes] uint8. Waits for what is on its way from there."""

    def deliver(self, piece: Piece, buffer: torch.Tensor) -> None:
        """Has the piece, now in `buffer`, brought to its target; may return before it is there."""

    def finish(self) -> None:
        """Waits until all is there."""


def load(
    wanted: Sequence[Wanted],
    lane: Callable[[int], Lane],
    *,
    num_readers: int,
    piece_bytes: int,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Fills every target.

    lane: makes a reader's lane, in the reader's thread, for pieces of at most so many bytes. advance: is called by the readers,
    one at a time, with the bytes of each piece that was read.

    Raises:
        CheckpointError: a file is missing, ends too early or cannot be read; the targets are then of no use.
    """
    pieces = cut(wanted, piece_bytes)  # 1.
    most = max((piece.num_bytes for piece in pieces), default=0)
    readers = min(num_readers, len(pieces))
    if not readers:
        return
    with ExitStack() as opened:
        files = {path: _open(path, opened) for path in dict.fromkeys(piece.path for piece in pieces)}
        queue = _Queue(pieces, advance)

        def read() -> None:  # 2.
            with closing(queue):
                own = lane(most)
                for piece in queue:
                    buffer = own.buffer(piece)
                    _read(files[piece.path], piece, buffer)
                    own.deliver(piece, buffer)
                    queue.done(piece)
                own.finish()  # 3.

        with ThreadPoolExecutor(readers, thread_name_prefix="weights") as pool, closing(queue):
            for reading in [pool.submit(read) for _ in range(readers)]:
                reading.result()


def cut(wanted: Sequence[Wanted], piece_bytes: int) -> list[Piece]:
    """The pieces of all that is wanted, by file and offset: whole slices, at most `piece_bytes` or else one slice."""
    pieces = []
    for each in sorted(wanted, key=lambda each: (each.extent.path, each.extent.offset)):
        extent, target = each.extent, each.target if each.target.ndim else each.target.view(1)
        num_slices, *within = extent.shape or (1,)
        slice_bytes = extent.num_bytes // max(1, num_slices)
        if not slice_bytes:
            continue
        count = max(1, piece_bytes // slice_bytes)
        for first in range(0, num_slices, count):
            slices = min(count, num_slices - first)
            pieces.append(
                Piece(
                    path=extent.path,
                    offset=extent.offset + first * slice_bytes,
                    num_bytes=slices * slice_bytes,
                    shape=(slices, *within),
                    stored=each.stored,
                    target=target[first : first + slices],
                    transform=each.transform,
                )
            )
    return pieces


class _Queue:
    """Hands each piece to one reader; empty for all of them as soon as one has failed."""

    def __init__(self, pieces: Sequence[Piece], advance: Callable[[int], None]):
        self._pieces, self._advance, self._lock = iter(pieces), advance, threading.Lock()

    def __iter__(self) -> Iterator[Piece]:
        while True:
            with self._lock:
                piece = next(self._pieces, None)
            if piece is None:
                return
            yield piece

    def done(self, piece: Piece) -> None:
        with self._lock:
            self._advance(piece.num_bytes)

    def close(self) -> None:
        """Leaves nothing to be read; each reader calls it when it has come to its end or has failed."""
        with self._lock:
            self._pieces = iter(())


def _open(path: Path, opened: ExitStack) -> int:
    try:
        file = os.open(regular(path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror}); download this file again") from None
    opened.callback(os.close, file)
    return file


def _read(file: int, piece: Piece, buffer: torch.Tensor) -> None:
    memory, read = memoryview(buffer.numpy()), 0
    while read < piece.num_bytes:
        try:
            count = os.preadv(file, [memory[read:]], piece.offset + read)
        except OSError as error:
            raise CheckpointError(f"{piece.path}: cannot be read ({error.strerror}); check the disk") from None
        if not count:
            end = piece.offset + piece.num_bytes
            raise CheckpointError(
                f"{piece.path}: ends at byte {piece.offset + read}, expected at least {end}; it was truncated while "
                "it was being loaded; download this file again"
            )
        read += count
