"""What `gluon_interpreter.py` computes with: tensors as tiles, places in them as pointers, shared memory."""

from types import SimpleNamespace

import torch


class Tile(torch.Tensor):
    """A tensor, or a scalar of no dimension, with the integer arithmetic of devices."""

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=None)

    def __floordiv__(self, other: object) -> "Tile":
        return torch.div(self, other, rounding_mode="trunc")

    def __mod__(self, other: object) -> "Tile":
        return torch.fmod(self, other)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> "Tile":
        return self.view(dtype) if bitcast else super().to(dtype)


def tile(value: object) -> Tile:
    return torch.as_tensor(value).as_subclass(Tile)


def fill_with_poison(tensor: torch.Tensor) -> None:
    """NaN; of integers, bytes that are NaN where they are FP8 numbers."""
    if tensor.is_floating_point() and tensor.itemsize > 1:
        tensor.fill_(float("nan"))
    else:
        tensor.copy_(torch.full((*tensor.shape, tensor.itemsize), 0x7F, dtype=torch.uint8).view(tensor.dtype).squeeze(-1))


class Pointer:
    """Into a tensor: one place, or one for each lane."""

    def __init__(self, tensor: torch.Tensor, offset: object = 0) -> None:
        self.tensor, self.offset = tensor.view(-1), tile(offset).long()
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: object) -> "Pointer":
        return Pointer(self.tensor, self.offset + offset)

    def places(self, mask: object) -> tuple[Tile, Tile]:
        """Of each lane: its place, 0 where the mask is off; and the mask."""
        mask = torch.ones_like(self.offset, dtype=torch.bool) if mask is None else tile(mask).expand(self.offset.shape)
        places = torch.where(mask, self.offset, 0)
        if mask.any() and not 0 <= int(places.min()) <= int(places.max()) < self.tensor.numel():
            raise IndexError(f"places {int(places.min())} to {int(places.max())} of a tensor of {self.tensor.numel()} elements")
        return places, mask


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape, self.dtype = tensor, list(tensor.shape), tensor.dtype

    def index(self, index: object) -> "Shared":
        return Shared(self.tensor[int(index)])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.tensor.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.tensor.permute(order))

    def load(self, layout: object) -> Tile:
        return tile(self.tensor.clone())

    def store(self, value: Tile) -> None:
        self.tensor.copy_(value)
