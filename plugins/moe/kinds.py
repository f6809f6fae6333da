"""The kinds of weights that experts may have, each with the launches that take it.

| kind | weights of a layer | rows as the first product reads them |
|---|---|---|
| `Plain` | gate_up_proj, down_proj in the rows' dtype | as they are |
| `Packed` | the same two, packed (`plugins.moe.packing`) | times `ROW_FACTOR` |
| `FourBits` | the same two, in 4 bits (`plugins.moe.int4`, `plugins.moe.nvfp4`) | as they are |
| `Fp8` | each followed by its scales | with a scale of their own, see `plugins.moe.fp8_kernel` |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from plugins.moe import four_bit_launch, fp8_launch, launch, packed_launch
from plugins.moe.int4 import is_int4
from plugins.moe.launch import Routing, Tile
from plugins.moe.nvfp4 import is_nvfp4
from plugins.moe.packing import ROW_FACTOR, is_packed
from plugins.triton_launch import Wrap, unwrapped


class RowsForm(NamedTuple):
    """How rows of the model's dtype are made ready: in which dtype; scaled, each row by its largest element; times a factor."""

    dtype: torch.dtype
    scaled: bool = False
    factor: float = 1.0


class Kind(Protocol):
    def rows_form(self, dtype: torch.dtype) -> RowsForm:
        """Of rows in the model's dtype."""

    def choose_tile(self, num_rows: int, top_k: int, num_experts: int, dtype: torch.dtype) -> Tile:
        """The tile for so many rows in the model's dtype."""

    def weighted_rows(
        self,
        rows: tuple[Tensor, ...],
        routing: Routing,
        experts: Sequence[Tensor],
        dtype: torch.dtype,
        *,
        tile: Tile,
        wrap: Wrap,
    ) -> Tensor:
        """Both products, without the sum over a row's experts: weighted [N * k, D] in the model's dtype.

        rows: made ready; for FP8 weights with their scales.
        """


class Plain:
    def rows_form(self, dtype: torch.dtype) -> RowsForm:
        return RowsForm(dtype)

    def choose_tile(self, num_rows: int, top_k: int, num_experts: int, dtype: torch.dtype) -> Tile:
        return launch.choose_tile(num_rows, top_k, num_experts, dtype)

    def weighted_rows(self, rows, routing, experts, dtype, *, tile: Tile, wrap: Wrap) -> Tensor:
        return launch.weighted_rows(rows[0], routing, *experts, tile=tile, wrap=wrap)


class Packed:
    def rows_form(self, dtype: torch.dtype) -> RowsForm:
        return RowsForm(dtype, factor=ROW_FACTOR)

    def choose_tile(self, num_rows: int, top_k: int, num_experts: int, dtype: torch.dtype) -> Tile:
        return packed_launch.choose_tile(num_rows, top_k, num_experts)

    def weighted_rows(self, rows, routing, experts, dtype, *, tile: Tile, wrap: Wrap) -> Tensor:
        return packed_launch.weighted_rows(rows[0], routing, *experts, tile=tile, wrap=wrap)


class FourBits:
    def rows_form(self, dtype: torch.dtype) -> RowsForm:
        return RowsForm(dtype)

    def choose_tile(self, num_rows: int, top_k: int, num_experts: int, dtype: torch.dtype) -> Tile:
        return four_bit_launch.choose_tile(num_rows, top_k, num_experts, dtype)

    def weighted_rows(self, rows, routing, experts, dtype, *, tile: Tile, wrap: Wrap) -> Tensor:
        return four_bit_launch.weighted_rows(rows[0], routing, *experts, tile=tile, wrap=wrap)


@dataclass(frozen=True)
class Fp8:
    fp8_rows: bool

    def rows_form(self, dtype: torch.dtype) -> RowsForm:
        return RowsForm(fp8_launch.row_dtype(dtype, self.fp8_rows), scaled=True)

    def choose_tile(self, num_rows: int, top_k: int, num_experts: int, dtype: torch.dtype) -> Tile:
        return fp8_launch.choose_tile(num_rows, top_k, num_experts, dtype, self.fp8_rows)

    def weighted_rows(self, rows, routing, experts, dtype, *, tile: Tile, wrap: Wrap) -> Tensor:
        return fp8_launch.weighted_rows(rows, routing, *experts, dtype=dtype, tile=tile, wrap=wrap)


def kind_of(experts: Sequence[Tensor], fp8_rows: bool) -> Kind:
    """The kind of a layer's weights, as the feed-forward operator gets them."""
    if len(experts) == 4:
        return Fp8(fp8_rows)
    if is_packed(experts[0]):
        return Packed()
    return FourBits() if is_int4(experts[0]) or is_nvfp4(experts[0]) else Plain()


def experts(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The operator as the package describes it, of weights of any kind but FP8, on the current stream; waits for nothing.

    Raises:
        ValueError: see the kind's `weighted_rows`.
    """
    weights, num_experts = (gate_up_proj, down_proj), gate_up_proj.shape[0]
    kind, top_k = kind_of(weights, fp8_rows=False), top_k_index.shape[1]
    tile = kind.choose_tile(hidden.shape[0], top_k, num_experts, hidden.dtype)
    rows = (hidden * kind.rows_form(hidden.dtype).factor).contiguous()
    routing = launch.route(top_k_index, top_k_weights, num_experts, tile)
    weighted = kind.weighted_rows((rows,), routing, weights, hidden.dtype, tile=tile, wrap=unwrapped)
    (output,) = launch.combine(weighted, top_k).run(unwrapped)
    return output
