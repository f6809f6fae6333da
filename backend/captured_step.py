"""A denoising step of one batch size, as `captured_loop` replays it: what it is given, what it leaves, and what runs it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from contract.model_config import LayerType


@dataclass(frozen=True, kw_only=True)
class Results:
    """What the host reads of a step, in memory that copies from the device do not wait for. One entry a row of the bucket."""

    states: Tensor  # [B] int8: `CanvasState`
    argmax: Tensor  # [B, C] int64
    steps: Tensor  # [B] int64

    @classmethod
    def of(cls, size: int, canvas_length: int, *, pinned: bool) -> "Results":
        return cls(
            states=torch.zeros(size, dtype=torch.int8, pin_memory=pinned),
            argmax=torch.zeros(size, canvas_length, dtype=torch.int64, pin_memory=pinned),
            steps=torch.zeros(size, dtype=torch.int64, pin_memory=pinned),
        )


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the graphs of one bucket are given."""

    staged: Tensor  # on the host, what goes to `on_device`
    on_device: Tensor  # [2, B] int64: rows of the state, prefix lengths

    @classmethod
    def of(cls, size: int, idle: int, device: torch.device) -> "Inputs":
        """All of them the idle row's."""
        staged = torch.zeros(2, size, dtype=torch.int64, pin_memory=device.type == "cuda")
        staged[0] = idle
        return cls(staged=staged, on_device=staged.to(device, copy=True))


@dataclass(frozen=True, kw_only=True)
class NewInputs:
    """What a step is given of new tokens of one sequence, [3 + 2 K, C] int64 with K layer types: the tokens, filled up; their
    positions; by layer type rows and cells of their keys and values; and in the last row slot and length of the sequence."""

    layer_types: tuple[LayerType, ...]
    staged: Tensor  # on the host, what goes to `on_device`
    on_device: Tensor
    starts: Tensor  # [2] int32, on the device

    @classmethod
    def of(cls, layer_types: tuple[LayerType, ...], canvas_length: int, idle: int, device: torch.device) -> "NewInputs":
        """Of the idle row, which nothing is written for."""
        staged = torch.zeros(3 + 2 * len(layer_types), canvas_length, dtype=torch.int64, pin_memory=device.type == "cuda")
        staged[1] = torch.arange(canvas_length)
        staged[3:-1:2] = -1
        staged[-1, 0] = idle
        starts = torch.tensor([0, canvas_length], dtype=torch.int32, device=device)
        return cls(layer_types=layer_types, staged=staged, on_device=staged.to(device, copy=True), starts=starts)

    def fill(self, slot: int, length: int, token_ids: Sequence[int], places: Mapping[LayerType, Tensor]) -> None:
        """length: of the sequence without the new tokens. places: see `PagedKVCache.appending`. The last copy must be over."""
        self.staged[0] = 0
        self.staged[0, : len(token_ids)] = torch.tensor(token_ids)
        self.staged[1] = torch.arange(length, length + self.staged.shape[1])
        for index, kind in enumerate(self.layer_types):
            of_kind, (_, count) = self.staged[2 + 2 * index : 4 + 2 * index], places[kind].shape
            of_kind[:, :count] = places[kind]
            of_kind[:, count:] = places[kind][:, -1:]  # once more what is written last
        self.staged[-1, :2] = torch.tensor([slot, length])
        self.on_device.copy_(self.staged, non_blocking=True)

    @property
    def slot(self) -> Tensor:
        """[1]."""
        return self.on_device[-1, :1]

    def tensors(self) -> dict[str, object]:
        """As `Session.mixed` takes them."""
        places = self.on_device[2:-1].unflatten(0, (-1, 2))
        return {
            "token_ids": self.on_device[0].int(),
            "positions": self.on_device[1].int(),
            "starts": self.starts,
            "length": self.on_device[-1, 1:2].int(),
            "places": dict(zip(self.layer_types, places, strict=True)),
        }


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of one bucket, ready to run: fill `inputs` and `new`, run `first`, then `second`; `first` leaves `results`."""

    inputs: Inputs
    new: NewInputs | None
    results: Results
    first: Callable[[], object]
    second: Callable[[], object]


def buckets(max_sequences: int) -> tuple[int, ...]:
    """1, 2, 4, … and at last max_sequences."""
    sizes = [1]
    while sizes[-1] < max_sequences:
        sizes.append(min(2 * sizes[-1], max_sequences))
    return tuple(sizes)
