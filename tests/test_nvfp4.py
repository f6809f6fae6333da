"""Weights in NVFP4: what rows stand for, where their numbers and scales are, and that nothing is rounded on the way."""

import pytest
import torch
from nvfp4_weights import VALUES, parts_of, random_rows

from plugins.moe.arranging import BLOCK
from plugins.moe.nvfp4 import (
    BYTES,
    GROUP,
    WORDS,
    all_finite,
    from_nvfp4,
    is_nvfp4,
    num_columns,
    numbers_of,
    nvfp4_shape,
    row_bytes,
    rows_of,
    to_nvfp4,
)

SHAPES = [((2, 128, 192), 1), ((3, 64, 96), 2), ((1, 1408, 704), 2), ((2, 30, 80), 2), ((1, 1, 16), 1)]


@pytest.mark.parametrize(("shape", "halves"), SHAPES)
def test_the_order_of_the_kernels_stands_for_the_same_numbers(shape, halves):
    rows = random_rows(shape)
    assert num_columns(rows.shape[2]) == shape[2]
    stored = to_nvfp4(rows, halves)
    assert is_nvfp4(stored) and tuple(stored.shape) == nvfp4_shape(shape, halves) and stored.is_contiguous()
    numbers, factors = from_nvfp4(stored, *shape[1:], halves)
    expected, expected_factors = numbers_of(rows)
    assert numbers.dtype == torch.bfloat16
    assert torch.equal(numbers.double(), expected.double())  # no product of a number and its scale is rounded
    assert torch.equal(factors, expected_factors)


def test_numbers_of_rows_by_their_definition():
    """Byte by byte, as Model Optimizer's and compressed-tensors' pages have them."""
    [row] = random_rows((1, 1, 64))[0]
    numbers, factor = numbers_of(row)
    for column in range(64):
        code = row[column // 2].item() >> 4 * (column % 2) & 15
        value = (-1) ** (code >> 3) * VALUES[code & 7].item()
        scale = row[32 + column // GROUP : 33 + column // GROUP].view(torch.float8_e4m3fn).item()
        assert numbers[column].item() == value * scale
    assert factor == row[-4:].clone().view(torch.float32)


def test_the_real_shapes():
    assert nvfp4_shape((128, 1408, 2816), 2) == (128, 22, 44 * BYTES + 4 * BLOCK)
    assert nvfp4_shape((128, 2816, 704), 1) == (128, 44, 11 * BYTES + 4 * BLOCK)
    assert BYTES * 8 == BLOCK * BLOCK * 4.5
    assert (row_bytes(2816), row_bytes(704)) == (1408 + 176 + 4, 352 + 44 + 4)


def test_rows_are_made_of_the_parts_of_a_checkpoint():
    weight = torch.randn(8, 48) * 0.02
    numbers, factors = numbers_of(rows_of(*parts_of(weight)))
    assert torch.equal(factors, factors[:1].expand(8))
    rounded = numbers * factors.unsqueeze(-1)
    assert (rounded - weight).norm() < 0.11 * weight.norm()
    assert torch.equal(numbers, numbers_of(rows_of(*parts_of(weight)[:2], torch.tensor([2.0])))[0])


@pytest.mark.parametrize("bad", ["scale", "factor"])
def test_what_is_no_number_stays_none(bad):
    rows = random_rows((1, BLOCK, BLOCK))
    if bad == "scale":
        rows[0, 5, BLOCK // 2 + 1] = 0x7F
    else:
        rows[0, 5, -4:] = torch.tensor([float("nan")]).view(torch.uint8)
    assert not all_finite(rows) and all_finite(rows[:, :5])
    stored = to_nvfp4(rows)[0, 0]
    if bad == "scale":
        scale = stored[4 * WORDS + 8 * 5 + 1].int()  # warp 0, lane_row 5, upper 0, far 0, next 1
        assert (0x7000 | scale << 4).to(torch.int16).view(torch.bfloat16).isnan()
    else:
        assert stored[BYTES:].clone().view(torch.float32).isnan().nonzero().tolist() == [[5]]


def test_numbers_and_scales_are_at_the_places_of_their_registers():
    """By the definition: each number of a block alone, the scale of its group beside it."""
    torch.manual_seed(0)
    places = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 13, 11, 10))
    for _ in range(64):
        warp, upper, lane_row, lane_column, far, next_, right, odd = (
            torch.randint(size, ()).item() for size in (4, 2, 8, 4, 2, 2, 2, 2)
        )
        row, column = 16 * warp + 8 * upper + lane_row, 32 * far + 16 * next_ + 8 * right + 2 * lane_column + odd
        rows = torch.zeros(1, BLOCK, row_bytes(BLOCK), dtype=torch.uint8)
        code = torch.randint(1, 16, ()).item()
        rows[0, row, column // 2] = code << 4 * odd
        rows[0, row, BLOCK // 2 + column // GROUP] = torch.tensor(0.3125).to(torch.float8_e4m3fn).view(torch.uint8)
        stored = to_nvfp4(rows)[0, 0]
        words = stored[: 4 * WORDS].view(torch.int32).long() & 0xFFFFFFFF
        place = 128 * warp + 16 * lane_row + 4 * lane_column + 2 * upper + far
        bits = words[place].item() >> 16 * odd
        assert [bits >> at & 1 for at in places[2 * next_ + right]] == [code >> 3 - bit & 1 for bit in range(4)]
        assert words.sum() == words[place]
        scale = stored[4 * WORDS + 64 * warp + 8 * lane_row + 4 * upper + 2 * far + next_].int()
        number = (0x7000 | scale << 4).to(torch.int16).view(torch.bfloat16)
        assert number.double() == 0.3125 * 2.0**119
