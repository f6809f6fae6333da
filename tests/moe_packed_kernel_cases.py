"""The cases of `test_moe_packed_kernels.py`, which runs this file in Triton's interpreter (TRITON_INTERPRET=1).

Memory that a kernel must not read is NaN: every output before its kernel runs (PyTorch's deterministic mode fills new
tensors with NaN, or the largest integer) and the scales of experts that no row chose.
"""

import pytest
import torch
from tolerances import assert_close
from triton_interpreter import (
    let_casts_round_to_bfloat16,
    let_dot_read_bfloat16,
    let_empty_assembly_pass,
    save_the_interpreters_time,
)

from plugins.moe import alignment, launch, packed_launch
from plugins.moe.arranged_launch import arranged_tile
from plugins.moe.arranging import BLOCK
from plugins.moe.packing import ROW_FACTOR, pack, unpack
from plugins.moe.reference import experts_reference

let_dot_read_bfloat16()
let_casts_round_to_bfloat16()
let_empty_assembly_pass()
save_the_interpreters_time()

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy's, about sigmoid of a large negative number: 1 / (1 + inf) = 0 is meant.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]

EXPERTS, TOP_K = 6, 2
BLOCKS = {1: arranged_tile(16, 64, 4, 2), 2: packed_launch.FEW_ROWS, 4: arranged_tile(32, 256, 8, 2)}
SIZES = [(128, 64), (96, 32), (70, 40), (40, 20), (200, 100)]


def operands(rows: int, hidden_size: int, width: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The operator's inputs with packed weights, and the numbers that these stand for."""
    hidden, index = torch.randn(rows, hidden_size).bfloat16(), torch.rand(rows, EXPERTS).topk(TOP_K).indices
    gate_up = (torch.randn(EXPERTS, 2 * width, hidden_size) * hidden_size**-0.5).bfloat16()
    down = (torch.randn(EXPERTS, hidden_size, width) * width**-0.5).bfloat16()
    packed = [pack(gate_up, halves=2), pack(down)]
    numbers = [unpack(packed[0], 2 * width, hidden_size, halves=2), unpack(packed[1], hidden_size, width)]
    for expert in set(range(EXPERTS)) - set(index.unique().tolist()):
        for each in packed:
            each[expert, :, -BLOCK:] = torch.tensor(float("nan")).view(torch.int32)
    return [hidden, index, torch.rand(rows, TOP_K), *packed], numbers


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("hidden_size", "width"), SIZES)
def test_products_are_those_of_plain_weights_to_the_bit(hidden_size, width, blocks):
    (hidden, index, weights, gate_up, down), (plain_gate_up, plain_down) = operands(17, hidden_size, width)
    tile = BLOCKS[blocks]
    routing = alignment.align(index, EXPERTS, tile.rows).run()
    (activated,) = packed_launch.gate_up(hidden * ROW_FACTOR, gate_up, *routing, TOP_K, tile).run()
    (weighted,) = packed_launch.down(activated, down, weights, *routing, hidden_size, tile).run()

    plain = launch.FEW_ROWS
    routing = alignment.align(index, EXPERTS, plain.rows).run()
    (expected,) = launch.gate_up(hidden, plain_gate_up, *routing, TOP_K, plain).run()
    assert torch.equal(activated[:, :width], expected * ROW_FACTOR)
    assert not activated[:, width:].any()
    (expected,) = launch.down(expected, plain_down, weights, *routing, plain).run()
    assert weighted.dtype == torch.bfloat16
    assert torch.equal(weighted, expected)


@pytest.mark.parametrize("rows", [1, 63])
def test_the_kernels_together_are_the_operator(rows):
    inputs, numbers = operands(rows, 70, 40)
    actual = packed_launch.experts_packed(*inputs)
    assert_close(actual, experts_reference(*inputs[:3], *numbers), torch.bfloat16)


def test_no_rows():
    (hidden, index, weights, *packed), _ = operands(1, 64, 32)
    assert packed_launch.experts_packed(hidden[:0], index[:0], weights[:0], *packed).shape == (0, 64)


def test_what_is_not_packed_for_these_rows_is_refused():
    (hidden, index, weights, gate_up, down), (plain, _) = operands(3, 64, 32)
    with pytest.raises(ValueError, match=r"got rows in torch\.float32, expected torch\.bfloat16"):
        packed_launch.experts_packed(hidden.float(), index, weights, gate_up, down)
    with pytest.raises(ValueError, match=r"gate_up_proj is \[6, 64, 64\] torch\.bfloat16 .* torch\.int32, contiguous; pack"):
        packed_launch.experts_packed(hidden, index, weights, plain, down)
    with pytest.raises(ValueError, match=r"down_proj is \[6, 2, 1600\] torch\.int32 .* expected \[6, 1, 1600\]"):
        packed_launch.experts_packed(hidden, index, weights, gate_up, torch.cat([down, down], dim=1))


def test_the_tile_follows_the_rows_of_an_expert():
    tiles = (packed_launch.FEW_ROWS, packed_launch.SOME_ROWS, packed_launch.MANY_ROWS)
    assert tuple(packed_launch.choose_tile(rows, 8, 128) for rows in (511, 512, 2048)) == tiles
    assert all(packed_launch.choose_down_tile(tile).rows == tile.rows for tile in tiles)
