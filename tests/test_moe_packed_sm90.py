"""The kernels of experts whose bfloat16 weights are stored in fewer bits compile for Hopper at the real model's shapes, on a
machine without a GPU.

Run with `-s` to see registers, shared memory and instructions of each.
"""

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from hopper import (
    HOPPER,
    check_compiles,
    check_factors_stay_until_they_are_read,
    check_weights_stay_in_their_threads,
)

from plugins.moe import alignment, four_bit_launch, packed_launch
from plugins.moe.formats import dtype_in_format, shape_in_format
from plugins.moe.packing import ROW_FACTOR
from plugins.triton_launch import Launch

HIDDEN, WIDTH, EXPERTS, TOP_K = 2816, 704, 128, 8


FORMATS = {
    "packed": (packed_launch.choose_tile, packed_launch.choose_down_tile, ROW_FACTOR),
    "int4": (partial(four_bit_launch.choose_tile, dtype=torch.bfloat16), four_bit_launch.choose_down_tile, 1.0),
    "nvfp4": (partial(four_bit_launch.choose_tile, dtype=torch.bfloat16), four_bit_launch.choose_down_tile, 1.0),
}
"""Their tiles, and what rows are times."""


def launches(rows: int, stored: str = "packed") -> dict[str, Launch]:
    """The products on meta tensors, the outputs of the first the inputs of the second."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def weight(*shape: int, halves: int) -> torch.Tensor:
        return tensor(*shape_in_format(shape, stored, halves), dtype=getattr(torch, dtype_in_format(stored)))

    choose_tile, choose_down_tile, factor = FORMATS[stored]
    tile = choose_tile(rows, TOP_K, EXPERTS)
    routing = alignment.align(tensor(rows, TOP_K, dtype=torch.int64), EXPERTS, tile.rows).outputs
    gate_up_proj, down_proj = weight(EXPERTS, 2 * WIDTH, HIDDEN, halves=2), weight(EXPERTS, HIDDEN, WIDTH, halves=1)
    gate_up = packed_launch.gate_up(tensor(rows, HIDDEN), gate_up_proj, *routing, TOP_K, tile, factor)
    top_k_weights = tensor(rows, TOP_K, dtype=torch.float32)
    down = packed_launch.down(*gate_up.outputs, down_proj, top_k_weights, *routing, HIDDEN, choose_down_tile(tile))
    assert gate_up.outputs[0].shape == (rows * TOP_K, WIDTH)
    assert down.outputs[0].shape == (rows * TOP_K, HIDDEN)
    return {"gate_up": gate_up, "down": down}


@pytest.mark.parametrize("name", ["gate_up", "down"])
@pytest.mark.parametrize("rows", [256, 1024, 16384])
@pytest.mark.parametrize("stored", FORMATS)
def test_compiles(stored, rows, name, tmp_path):
    described = launches(rows, stored)[name]
    instructions = check_compiles(described, tmp_path, f"{stored}, {rows} rows")
    assert instructions["cp.async.cg"], "no 16-byte asynchronous copies"
    ptx = described.compile(HOPPER).asm["ptx"]
    assert ptx.count("f32.bf16.bf16") == instructions["wgmma.mma_async"] > 0
    check_weights_stay_in_their_threads(ptx)
    check_factors_stay_until_they_are_read(tmp_path / "kernel.cubin")


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize(("name", "grid", "groups", "products"), [("gate_up", (132,), 3, 16), ("down", (2, 1151), 2, 44)])
def test_products_of_many_rows_compile(name, grid, groups, products, stored, tmp_path):
    """Of its groups of warps two multiply, in a loop or in all steps of a block, and each is as one of Triton's programs."""
    described = launches(16384, stored)[name]
    if name == "gate_up":
        described = packed_launch.hopper_gate_up(*described.inputs, TOP_K, packed_launch.MANY_ROWS, FORMATS[stored][2])
    else:
        described = packed_launch.hopper_down(*described.inputs, HIDDEN, packed_launch.MANY_ROWS)
    assert described.grid == grid
    instructions = check_compiles(described, tmp_path, f"{stored}, 16384 rows", groups=groups)
    ptx = described.compile(HOPPER).asm["ptx"]
    assert ptx.count("f32.bf16.bf16") == instructions["wgmma.mma_async"] == 2 * products
    check_weights_stay_in_their_threads(ptx)
    check_factors_stay_until_they_are_read(tmp_path / "kernel.cubin")


def test_grids_at_the_real_sizes():
    few, many = launches(256), launches(16384)
    assert (few["gate_up"].grid, few["down"].grid) == ((11, 188), (44, 188))
    assert (many["gate_up"].grid, many["down"].grid) == ((11, 1151), (22, 1151))
