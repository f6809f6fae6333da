"""The cases of `test_moe_fp8_kernels.py`, which runs this file in Triton's interpreter (TRITON_INTERPRET=1).

Memory that a kernel must not read is NaN: every output before its kernel runs (PyTorch's deterministic mode fills new
tensors with NaN, or the largest integer) and the scales of experts that no row chose.
"""

import pytest
import torch
import triton
import triton.language as tl
from expert_formats import arranged
from tolerances import assert_close
from triton_interpreter import (
    let_casts_know_e4m3,
    let_dot_read_bfloat16,
    let_empty_assembly_pass,
    let_fma_round_once,
    save_the_interpreters_time,
)

from plugins.moe import alignment, fp8_launch
from plugins.moe.arranged_launch import arranged_tile
from plugins.moe.fp8 import from_fp8, to_fp8
from plugins.moe.fp8_kernel import divided
from plugins.moe.fp8_reference import experts_fp8_reference
from plugins.moe.kernel_reference import down_reference, gate_up_reference

let_dot_read_bfloat16()
let_casts_know_e4m3()
let_empty_assembly_pass()
let_fma_round_once()
save_the_interpreters_time()

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy's, about sigmoid of a large negative number: 1 / (1 + inf) = 0 is meant.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]

DTYPES = [torch.float32, torch.bfloat16]
EXPERTS, TOP_K = 6, 2
BOTH = {"a block": arranged_tile(16, 64, 4, 2), "few rows": fp8_launch.FEW_ROWS, "two blocks": arranged_tile(32, 128, 4, 2)}
TILES = {
    False: BOTH | {"four blocks": arranged_tile(32, 256, 8, 2)},
    True: BOTH | {"two blocks, 128 deep": arranged_tile(32, 128, 4, 2, depth=128)},
}
"""By whether rows are FP8."""
CASES = [(fp8_rows, tile, *sizes) for fp8_rows, tiles in TILES.items() for tile in tiles for sizes in ((40, 20), (200, 100))]


def operands(rows: int, hidden_size: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    index = torch.rand(rows, EXPERTS).topk(TOP_K).indices
    gate_up, gate_up_scale = to_fp8(torch.randn(EXPERTS, 2 * width, hidden_size) * 0.3)
    down, down_scale = to_fp8(torch.randn(EXPERTS, hidden_size, width) * 0.3)
    unused = sorted(set(range(EXPERTS)) - set(index.unique().tolist()))
    gate_up_scale[unused] = down_scale[unused] = float("nan")
    return [torch.randn(rows, hidden_size).to(dtype), index, torch.rand(rows, TOP_K), gate_up, gate_up_scale, down, down_scale]


def ready(inputs: list[torch.Tensor], fp8_rows: bool) -> list[torch.Tensor]:
    """The operands with weights as the kernels take them."""
    return [*inputs[:3], *arranged(inputs[3:], "narrow" if fp8_rows else "wide")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fp8_rows", "tile", "hidden_size", "width"), CASES)
def test_grouped_products(tile, hidden_size, width, dtype, fp8_rows):
    """Each on the same numbers as its reference: what rounding to FP8 in between makes of a difference is not measured here."""
    inputs = operands(17, hidden_size, width, dtype)
    hidden, index, weights, gate_up, gate_up_scale, down, down_scale = inputs
    *_, ordered_gate_up, _, ordered_down, _ = ready(inputs, fp8_rows)
    rows_in, tile = fp8_launch.row_dtype(dtype, fp8_rows), TILES[fp8_rows][tile]
    routing = alignment.align(index, EXPERTS, tile.rows).run()

    numbers, scale = fp8_launch.scale_rows(hidden, rows_in).run()
    (activated,) = fp8_launch.gate_up(numbers, scale, ordered_gate_up, gate_up_scale, *routing, TOP_K, tile, dtype).run()
    expected = gate_up_reference(from_fp8(numbers, scale), from_fp8(gate_up, gate_up_scale), index)
    assert activated.dtype == dtype
    assert_close(activated, expected, dtype)

    numbers, scale = fp8_launch.scale_rows(expected.to(dtype), rows_in).run()
    (weighted,) = fp8_launch.down(numbers, scale, ordered_down, down_scale, weights, *routing, tile, dtype).run()
    assert weighted.dtype == dtype
    assert_close(weighted, down_reference(from_fp8(numbers, scale), from_fp8(down, down_scale), weights, index), dtype)


@pytest.mark.parametrize(
    ("dtype", "fp8_rows"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)], ids=str
)
@pytest.mark.parametrize("rows", [1, 17])
def test_the_kernels_together_are_the_operator(rows, dtype, fp8_rows):
    inputs = operands(rows, 40, 20, dtype)
    actual = fp8_launch.experts_fp8(*ready(inputs, fp8_rows), fp8_rows)
    assert actual.dtype == dtype
    assert_close(actual, experts_fp8_reference(*inputs, fp8_rows), dtype)


@pytest.mark.parametrize("columns", [1, 63, 257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_rows_are_the_rows_rounded(columns, dtype):
    rows = (torch.randn(9, columns) * torch.logspace(-6, 6, 9)[:, None]).to(dtype)
    rows[3] = 0
    numbers, scale = fp8_launch.scale_rows(rows, torch.float8_e4m3fn).run()
    expected, expected_scale = to_fp8(rows)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(numbers.float(), expected.float())


@triton.jit
def divide_kernel(values, scales, quotients, COLUMNS: tl.constexpr):  # noqa: N803 - constants are in capitals
    row, columns = tl.program_id(0), tl.arange(0, COLUMNS)
    result = divided(tl.load(values + row * COLUMNS + columns), tl.load(scales + row))
    tl.store(quotients + row * COLUMNS + columns, result)


def test_a_division_is_rounded_once():
    """To the bit PyTorch's, of float32 numbers up to 2^-30 of the largest, by the scales that this gives."""
    values = torch.randn(200, 4096) * 2.0 ** -torch.randint(30, (200, 4096))
    values[:, 5] = 0
    scales = values.abs().amax(dim=1) / 448 * torch.logspace(-1, 1, 200)
    quotients = torch.empty_like(values)
    divide_kernel[(200,)](values, scales, quotients, COLUMNS=4096)
    assert torch.equal(quotients, values / scales[:, None])


def test_rows_as_they_are_lose_nothing():
    """bfloat16 rows in float16, over 2^-17 to 2^15 of a number: their 8 bits and the zero row come back."""
    rows = (torch.randn(9, 63) * torch.logspace(-6, 6, 9)[:, None]).bfloat16()
    rows[:, 1:] *= 2.0 ** -torch.arange(62).clamp(max=22)
    rows[3] = 0
    numbers, scale = fp8_launch.scale_rows(rows, torch.float16).run()
    assert numbers.isfinite().all()
    assert torch.equal(scale.log2(), scale.log2().round())
    assert torch.equal(numbers.float() * scale[:, None], rows.float())


def test_float32_rows_stay_float32():
    rows = torch.randn(9, 63)
    numbers, scale = fp8_launch.scale_rows(rows, fp8_launch.row_dtype(torch.float32, False)).run()
    assert torch.equal(numbers * scale[:, None], rows)


def test_no_rows():
    inputs = operands(1, 24, 12, torch.float32)
    hidden, index, weights = (each[:0] for each in inputs[:3])
    for fp8_rows in (False, True):
        none = ready([hidden, index, weights, *inputs[3:]], fp8_rows)
        assert fp8_launch.experts_fp8(*none, fp8_rows).shape == (0, 24)


def test_weights_that_are_not_ready_are_refused():
    plain = operands(3, 24, 12, torch.float32)
    hidden, index, weights, gate_up, gate_up_scale, down, down_scale = ready(plain, False)
    with pytest.raises(ValueError, match=r"gate_up_proj is \[6, 24, 24\] .*, expected \[6, 1, 4096\] .*arrange it when"):
        fp8_launch.experts_fp8(*plain, False)
    with pytest.raises(ValueError, match=r"down_proj is \[6, 1, 4096\] torch\.bfloat16, expected .*e4m3fn; quantize"):
        fp8_launch.experts_fp8(hidden, index, weights, gate_up, gate_up_scale, down.bfloat16(), down_scale, False)
    with pytest.raises(ValueError, match=r"gate_up_proj_scale has strides \(1, 6\); make it contiguous"):
        wrong = gate_up_scale.t().contiguous().t()
        fp8_launch.experts_fp8(hidden, index, weights, gate_up, wrong, down, down_scale, False)


@pytest.mark.parametrize(
    ("fp8_rows", "tiles"),
    [
        (False, (fp8_launch.FEW_ROWS, fp8_launch.SOME_ROWS, fp8_launch.MANY_ROWS)),
        (True, (fp8_launch.FEW_ROWS, fp8_launch.SOME_FP8_ROWS, fp8_launch.MANY_FP8_ROWS)),
    ],
)
def test_the_tile_follows_the_rows_of_an_expert(fp8_rows, tiles):
    chosen = tuple(fp8_launch.choose_tile(rows, 8, 128, torch.bfloat16, fp8_rows) for rows in (511, 512, 2048))
    assert chosen == tiles
    assert fp8_launch.choose_tile(256, 8, 128, torch.float32, fp8_rows) == fp8_launch.FLOAT32
    assert all(fp8_launch.choose_down_tile(tile).rows == tile.rows for tile in tiles)
