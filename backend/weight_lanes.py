"""How a piece of a weight gets from the reader that read it to its target: see `weight_loading`.

HostLane    reads into the target itself; through one buffer where the bytes are transformed
StagedLane  two buffers, which a device copies from while the reader fills the other: pinned memory and a stream of the
            reader's own (`CudaCopies`)
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from backend.weight_loading import Piece

_NUM_BUFFERS = 2

Wait = Callable[[], object]


class HostLane:
    """To targets in host memory."""

    def __init__(self, most_bytes: int):
        self._most_bytes = most_bytes
        self._staging: Tensor | None = None

    def buffer(self, piece: Piece) -> Tensor:
        if piece.transform is None:
            return piece.target.flatten().view(torch.uint8)
        if self._staging is None:
            self._staging = torch.empty(self._most_bytes, dtype=torch.uint8)
        return self._staging[: piece.num_bytes]

    def deliver(self, piece: Piece, buffer: Tensor) -> None:
        if piece.transform is not None:
            piece.target.copy_(piece.transform(piece.as_stored(buffer), piece.target.dtype))

    def finish(self) -> None:
        pass


class Copies(Protocol):
    """A device that copies from host memory by itself."""

    def staging(self, num_bytes: int) -> Tensor:
        """Host memory that it copies from, [num_bytes] uint8."""

    def start(self, piece: Piece, staged: Tensor) -> Wait:
        """Starts the copy of `staged` [num_bytes] uint8 to the piece's target; the result waits for its end."""


class StagedLane:
    """To targets on a device."""

    def __init__(self, most_bytes: int, copies: Copies):
        self._copies = copies
        self._staging = [copies.staging(most_bytes) for _ in range(_NUM_BUFFERS)]
        self._under_way: list[Wait | None] = [None] * _NUM_BUFFERS
        self._next = 0

    def buffer(self, piece: Piece) -> Tensor:
        self._wait(self._next)
        return self._staging[self._next][: piece.num_bytes]

    def deliver(self, piece: Piece, buffer: Tensor) -> None:
        self._under_way[self._next] = self._copies.start(piece, buffer)
        self._next = (self._next + 1) % _NUM_BUFFERS

    def finish(self) -> None:
        for index in range(_NUM_BUFFERS):
            self._wait(index)

    def _wait(self, index: int) -> None:
        wait, self._under_way[index] = self._under_way[index], None
        if wait is not None:
            wait()


class CudaCopies:
    """A stream of its own on each GPU. What was enqueued on the streams `after`, where the targets were allocated, comes first;
    `StagedLane.finish` waits for the copies, so that every stream may use the targets then."""

    def __init__(self, after: Sequence[torch.cuda.Stream]):
        self._streams = {each.device: torch.cuda.Stream(each.device) for each in after}
        for each in after:
            self._streams[each.device].wait_stream(each)

    def staging(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def start(self, piece: Piece, staged: Tensor) -> Wait:
        with torch.cuda.stream(self._streams[piece.target.device]):
            if piece.transform is None:
                piece.target.flatten().view(torch.uint8).copy_(staged, non_blocking=True)
            else:
                there = staged.to(piece.target.device, non_blocking=True)
                piece.target.copy_(piece.transform(piece.as_stored(there), piece.target.dtype))
            copied = torch.cuda.Event(blocking=True)  # a reader that waits leaves its core to others
            copied.record()
        return copied.synchronize
