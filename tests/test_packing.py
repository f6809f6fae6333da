"""The order and the formats in which experts' weights are bound: what they keep of a weight, and where they put it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.moe.arranging import BLOCK, arrange, arranged_shape, from_blocks, in_blocks
from plugins.moe.formats import OF_BFLOAT16, dtype_in_format, in_format, shape_in_format
from plugins.moe.packing import GROUPS, PLANES, ROW_FACTOR, is_packed, pack, packed_shape, unpack

SHAPES = [((2, 128, 192), 1), ((3, 64, 96), 2), ((2, 96, 32), 1), ((1, 1408, 704), 2), ((2, 30, 70), 2), ((1, 1, 1), 1)]


def normal(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 0.02).bfloat16()


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What packing should keep, in float64: with 2^t the power of two of a row's largest number, what is smaller than
    2^(t - 14) becomes the nearest multiple of 2^(t - 21)."""
    exact = weight.double()
    largest = exact.abs().amax(-1, keepdim=True)
    power = torch.exp2(torch.where(largest > 0, largest, 1.0).log2().floor())
    step = power * 2.0**-21
    return torch.where(exact.abs() >= power * 2.0**-14, exact, (exact / step).round() * step)


@pytest.mark.parametrize(("shape", "halves"), SHAPES)
def test_packing_keeps_all_but_the_smallest_numbers(shape, halves):
    weight = normal(*shape)
    packed = pack(weight, halves)
    assert is_packed(packed) and not is_packed(weight)
    assert tuple(packed.shape) == packed_shape(shape, halves)
    assert packed.is_contiguous()
    unpacked = unpack(packed, *shape[1:], halves)
    assert unpacked.dtype == torch.bfloat16
    assert torch.equal(unpacked.double(), rounded(weight))


def test_few_numbers_change_and_hardly():
    """Of normal weights 1 in 9,000. Their product with rows changes by far less than float32 sums round it."""
    weight, rows = normal(1, 256, 2816), torch.randn(2816, 16).bfloat16()
    unpacked = unpack(pack(weight), 256, 2816)
    changed = (unpacked != weight).float().mean().item()
    assert 0.5 / 9000 < changed < 2 / 9000
    exact, packed = (each[0].double() @ rows.double() for each in (weight, unpacked))
    in_float32 = weight[0].float() @ rows.float()
    assert (packed - exact).norm() < 0.1 * (in_float32 - exact).norm()


def test_special_numbers():
    weight = normal(1, 64, 64)
    weight[0, 0] = 0
    weight[0, 1, ::2] = -0.0
    weight[0, 2] *= 2.0**-118  # with bfloat16's own subnormal numbers
    weight[0, 3, 5] = 2.0**79
    weight[0, 4, 5] = 1.0  # far above the rest
    weight[0, 5] *= 2.0**60
    weight[0, 6] = torch.tensor([1.0, 2.0**-15, -(2.0**-21), 2.0**-22, 2.0**-23, 3 * 2.0**-22] + 58 * [0.0])
    unpacked = unpack(pack(weight), 64, 64)
    assert torch.equal(unpacked.double(), rounded(weight))
    assert torch.equal(torch.signbit(unpacked[0, 1]), torch.signbit(weight[0, 1]))
    assert unpacked[0, 6, :6].tolist() == [1.0, 2.0**-15, -(2.0**-21), 0.0, 0.0, 2 * 2.0**-21]  # halves go to even numbers


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, (1 << 16) - 1), min_size=64, max_size=64))
def test_any_row(numbers):
    """Any bits that are a number below 2^80."""
    bits = torch.tensor(numbers)
    weight = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16).view(torch.bfloat16).view(1, 1, 64)
    weight = torch.where(weight.abs() < 2.0**80, weight, 1.0).bfloat16()
    assert torch.equal(unpack(pack(weight), 1, 64).double(), rounded(weight))


def test_a_packed_number_is_at_the_place_of_its_register():
    """Group and place by the definition; the bits of a whole number, and the scale behind the words."""
    weight = torch.zeros(1, BLOCK, BLOCK).bfloat16()
    warp, upper, lane_row, lane_column, far, next_, right, odd = 3, 1, 5, 2, 1, 1, 0, 1
    weight[0, 16 * warp + 8 * upper + lane_row, 32 * far + 16 * next_ + 8 * right + 2 * lane_column + odd] = -1.5
    packed = pack(weight)
    group = 128 * warp + 16 * lane_row + 4 * lane_column + 2 * upper + far
    words = packed[0, 0, : PLANES * GROUPS].view(PLANES, GROUPS)
    # The third pair of a group, next 1 and right 0, is whole in the third word. 1.5: exponent 15 of 15, mantissa 64.
    assert words.nonzero().tolist() == [[2, group]]
    assert words[2, group].item() & 0xFFFFFFFF == (0x8000 | 15 << 7 | 64) << 16
    scales = packed[0, 0, PLANES * GROUPS :].view(torch.float32)
    assert scales[16 * warp + 8 * upper + lane_row] * ROW_FACTOR == 2.0 ** (127 - 15)


@pytest.mark.parametrize(("shape", "halves"), SHAPES)
def test_blocks(shape, halves):
    weight = torch.randn(shape)
    blocks = in_blocks(weight, halves)
    assert blocks.shape[2] == BLOCK and blocks.shape[3] % BLOCK == 0
    assert torch.equal(from_blocks(blocks, *shape[1:], halves), weight)
    assert blocks.count_nonzero() == weight.count_nonzero()


def test_halves_follow_each_other_in_turns():
    weight = torch.arange(128).view(1, 128, 1).expand(1, 128, 64)
    rows = in_blocks(weight, 2)[0, :, :, 0]
    turns = [[*range(8 * turn, 8 * turn + 8), *range(64 + 8 * turn, 64 + 8 * turn + 8)] for turn in range(8)]
    assert rows.flatten().tolist() == list(itertools.chain.from_iterable(turns))


@pytest.mark.parametrize("narrow", [False, True])
def test_fp8_numbers_are_in_the_order_of_the_registers(narrow):
    numbers = (torch.arange(BLOCK * BLOCK) % 251).to(torch.uint8)
    arranged = arrange(numbers.view(torch.float8_e4m3fn).view(1, BLOCK, BLOCK), 1, narrow=narrow)
    expected = []
    for upper, warp, lane_row, lane_column, far in itertools.product(*map(range, (2, 4, 8, 4, 2))):
        row = BLOCK * (16 * warp + 8 * upper + lane_row)
        if narrow:
            columns = [16 * right + 4 * lane_column + byte for right, byte in itertools.product(range(2), range(4))]
        else:
            places = itertools.product(range(2), range(2), range(2))
            columns = [16 * next_ + 8 * right + 2 * lane_column + odd for next_, right, odd in places]
        expected += [row + 32 * far + column for column in columns]
    assert torch.equal(arranged.view(torch.uint8).flatten(), numbers[expected])


@pytest.mark.parametrize("wanted", ["packed", "int4", "wide", "narrow"])
@pytest.mark.parametrize(("shape", "halves"), SHAPES)
def test_shapes_and_dtypes_are_known_before(wanted, shape, halves):
    weight = normal(*shape) if wanted in OF_BFLOAT16 else normal(*shape).to(torch.float8_e4m3fn)
    formed = in_format(weight, wanted, halves)
    assert tuple(formed.shape) == shape_in_format(shape, wanted, halves)
    assert formed.dtype == getattr(torch, dtype_in_format(wanted))
    assert arranged_shape((128, 1408, 2816), 2) == (128, 22, 64 * 2816)
    assert packed_shape((128, 1408, 2816), 2) == (128, 22, 24 * 2816 + 64)


def test_a_weight_is_the_same_whether_it_is_arranged_at_once_or_expert_by_expert():
    """As it is read."""
    weight = normal(4, 66, 70)
    for wanted, own in (("packed", weight), ("int4", weight), ("wide", weight.to(torch.float8_e4m3fn))):
        parts = [in_format(expert, wanted, 2) for expert in own.split(1)]
        whole = in_format(own, wanted, 2)
        assert torch.equal(torch.cat([each.view(torch.uint8) for each in parts]), whole.view(torch.uint8))
