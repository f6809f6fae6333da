"""The cases of `test_moe_packed_kernels.py`, which runs this file in Triton's interpreter (TRITON_INTERPRET=1): experts whose
weights are bfloat16 numbers in fewer bits, 12 (packed) or 4.

Memory that a kernel must not read is NaN: every output before its kernel runs (PyTorch's deterministic mode fills new
tensors with NaN, or the largest integer) and the scales of experts that no row chose.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from nvfp4_weights import random_rows, rounded_rows
from tolerances import assert_close
from triton_interpreter import (
    let_assembly_scale_pairs,
    let_casts_round_to_bfloat16,
    let_dot_read_bfloat16,
    let_empty_assembly_pass,
    save_the_interpreters_time,
)

from plugins.moe import alignment, four_bit_launch, launch, packed_launch
from plugins.moe.arranged_launch import arranged_tile
from plugins.moe.arranging import BLOCK
from plugins.moe.fp8_reference import experts_fp8_reference
from plugins.moe.int4 import HALFWORDS, SCALES, from_int4, to_int4
from plugins.moe.kinds import experts
from plugins.moe.nvfp4 import GROUP, from_nvfp4, numbers_of, to_nvfp4
from plugins.moe.packing import ROW_FACTOR, pack, unpack
from plugins.moe.reference import experts_reference

let_dot_read_bfloat16()
let_casts_round_to_bfloat16()
let_empty_assembly_pass()
let_assembly_scale_pairs()
save_the_interpreters_time()

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy's, about sigmoid of a large negative number: 1 / (1 + inf) = 0 is meant.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]

EXPERTS, TOP_K = 6, 2
FACTOR = 2.0**-9
"""Of NVFP4 weights: a power of two, so that with it, too, they are bfloat16 numbers."""

BLOCKS = {1: arranged_tile(16, 64, 4, 2), 2: packed_launch.FEW_ROWS, 4: arranged_tile(32, 256, 8, 2)}
SIZES = [(128, 64), (96, 32), (70, 40), (40, 20), (200, 100)]


def with_factors(weight: torch.Tensor, *sizes: int, halves: int = 1) -> torch.Tensor:
    numbers, factors = from_nvfp4(weight, *sizes, halves)
    return numbers * factors.bfloat16().unsqueeze(-1)


class Stored(NamedTuple):
    """A format: to it and back, what the rows of the products are times, and what sizes are multiples of."""

    to: Callable
    back: Callable
    row_factor: float = 1.0
    multiple: int = 1

    def filled(self, *sizes: int) -> list[int]:
        return [-(-size // self.multiple) * self.multiple for size in sizes]


def to_rows(weight: torch.Tensor, halves: int = 1) -> torch.Tensor:
    return to_nvfp4(rounded_rows(weight, halves, FACTOR), halves)


FORMATS = {
    "packed": Stored(pack, unpack, ROW_FACTOR),
    "int4": Stored(to_int4, from_int4),
    "nvfp4": Stored(to_rows, with_factors, multiple=GROUP),
}


def operands(stored: str, rows: int, hidden_size: int, width: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The operator's inputs with weights in a format, and the numbers that these stand for."""
    hidden, index = torch.randn(rows, hidden_size).bfloat16(), torch.rand(rows, EXPERTS).topk(TOP_K).indices
    gate_up = (torch.randn(EXPERTS, 2 * width, hidden_size) * hidden_size**-0.5).bfloat16()
    down = (torch.randn(EXPERTS, hidden_size, width) * width**-0.5).bfloat16()
    to, back, *_ = FORMATS[stored]
    weights = [to(gate_up, halves=2), to(down)]
    numbers = [back(weights[0], 2 * width, hidden_size, halves=2), back(weights[1], hidden_size, width)]
    for expert in set(range(EXPERTS)) - set(index.unique().tolist()):
        for each in weights:
            scales_of(stored, each[expert]).fill_(float("nan"))
    return [hidden, index, torch.rand(rows, TOP_K), *weights], numbers


def scales_of(stored: str, expert: torch.Tensor) -> torch.Tensor:
    """A view of the scales in an expert's weight [blocks, items]."""
    if stored != "int4":
        return expert.view(torch.float32)[:, -BLOCK:]
    return expert.view(torch.bfloat16).view(len(expert), -1, HALFWORDS)[..., -SCALES:]


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("hidden_size", "width"), SIZES)
def test_products_are_those_of_plain_weights_to_the_bit(hidden_size, width, blocks, stored):
    hidden_size, width = FORMATS[stored].filled(hidden_size, width)
    (hidden, index, weights, gate_up, down), (plain_gate_up, plain_down) = operands(stored, 17, hidden_size, width)
    tile, factor = BLOCKS[blocks], FORMATS[stored].row_factor
    routing = alignment.align(index, EXPERTS, tile.rows).run()
    (activated,) = packed_launch.gate_up(hidden * factor, gate_up, *routing, TOP_K, tile, factor).run()
    (weighted,) = packed_launch.down(activated, down, weights, *routing, hidden_size, tile).run()

    plain = launch.FEW_ROWS
    routing = alignment.align(index, EXPERTS, plain.rows).run()
    (expected,) = launch.gate_up(hidden, plain_gate_up, *routing, TOP_K, plain).run()
    assert torch.equal(activated[:, :width], expected * factor)
    assert not activated[:, width:].any()
    (expected,) = launch.down(expected, plain_down, weights, *routing, plain).run()
    assert weighted.dtype == torch.bfloat16
    assert torch.equal(weighted, expected)


@pytest.mark.parametrize("made", [rounded_rows, None], ids=["rounded", "any numbers and scales"])
def test_factors_of_nvfp4_weights_are_applied_to_sums(made):
    """Those of experts and of their halves are their own, and no powers of two."""
    (hidden, index, weights, *_), _ = operands("nvfp4", 17, 80, 48)
    shapes = (EXPERTS, 96, 80), (EXPERTS, 80, 48)
    rows = [made(torch.randn(shape) * shape[2] ** -0.5) if made else random_rows(shape) for shape in shapes]
    numbers = [part for each in rows for part in numbers_of(each)]
    actual = experts(hidden, index, weights, to_nvfp4(rows[0], halves=2), to_nvfp4(rows[1]))
    assert_close(actual, experts_fp8_reference(hidden, index, weights, *numbers, False), torch.bfloat16)


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("rows", [1, 63])
def test_the_kernels_together_are_the_operator(rows, stored):
    inputs, numbers = operands(stored, rows, *FORMATS[stored].filled(70, 40))
    actual = experts(*inputs)
    assert_close(actual, experts_reference(*inputs[:3], *numbers), torch.bfloat16)


@pytest.mark.parametrize("stored", ["int4", "nvfp4"])
def test_float32_rows_meet_the_numbers_of_4_bits(stored):
    (hidden, *others), numbers = operands(stored, 17, *FORMATS[stored].filled(70, 40))
    actual = experts(hidden.float(), *others)
    assert actual.dtype == torch.float32
    assert_close(actual, experts_reference(hidden.float(), *others[:2], *(each.float() for each in numbers)), torch.float32)


@pytest.mark.parametrize("stored", FORMATS)
def test_no_rows(stored):
    (hidden, index, weights, *stored_weights), _ = operands(stored, 1, 64, 32)
    assert experts(hidden[:0], index[:0], weights[:0], *stored_weights).shape == (0, 64)


def test_what_is_not_in_the_format_is_refused():
    (hidden, index, weights, gate_up, down), (plain, _) = operands("packed", 3, 64, 32)
    tile = packed_launch.FEW_ROWS
    routing = launch.route(index, weights, EXPERTS, tile)
    with pytest.raises(ValueError, match=r"got rows in torch\.float32, expected torch\.bfloat16"):
        packed_launch.weighted_rows(hidden.float(), routing, gate_up, down, tile=tile)
    with pytest.raises(ValueError, match=r"gate_up_proj is \[6, 64, 64\] torch\.bfloat16 .* torch\.int32, contiguous; bring"):
        packed_launch.weighted_rows(hidden, routing, plain, down, tile=tile)
    with pytest.raises(ValueError, match=r"down_proj is \[6, 2, 1600\] torch\.int32 .* expected \[6, 1, 1600\]"):
        packed_launch.weighted_rows(hidden, routing, gate_up, torch.cat([down, down], dim=1), tile=tile)
    with pytest.raises(ValueError, match=r"gate_up_proj is .* torch\.int32 .* expected \[6, 1, 1152\] torch\.int16"):
        four_bit_launch.weighted_rows(hidden, routing, gate_up, down, tile=tile)


def test_the_tile_follows_the_rows_of_an_expert():
    for module, dtype in ((packed_launch, ()), (four_bit_launch, (torch.bfloat16,))):
        tiles = (module.FEW_ROWS, module.SOME_ROWS, module.MANY_ROWS)
        assert tuple(module.choose_tile(rows, 8, 128, *dtype) for rows in (511, 512, 2048)) == tiles
        assert all(module.choose_down_tile(tile).rows == tile.rows for tile in tiles)
