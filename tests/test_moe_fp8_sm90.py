"""The kernels of FP8 experts compile for Hopper at the real model's shapes, on a machine without a GPU.

Run with `-s` to see registers, shared memory and instructions of each.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from hopper import (
    HOPPER,
    check_compiles,
    check_factors_stay_until_they_are_read,
    check_weights_stay_in_their_threads,
)

from plugins.moe import alignment, fp8_launch
from plugins.moe.arranged_launch import hopper_tile
from plugins.moe.arranging import arranged_shape
from plugins.moe.hopper_down_fp8_kernel import hopper_down_fp8_kernel
from plugins.moe.hopper_down_kernel import hopper_down_wide_kernel
from plugins.triton_launch import Launch

HIDDEN, WIDTH, EXPERTS, TOP_K = 2816, 704, 128, 8
STAGES = ("scale_rows", "gate_up", "scale_activated", "down")


def launches(rows: int, fp8_rows: bool) -> dict[str, Launch]:
    """The stages on meta tensors, each kernel's outputs the next one's inputs."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    dtype, rows_in = torch.bfloat16, fp8_launch.row_dtype(torch.bfloat16, fp8_rows)
    tile = fp8_launch.choose_tile(rows, TOP_K, EXPERTS, dtype, fp8_rows)
    align = alignment.align(tensor(rows, TOP_K, dtype=torch.int64), EXPERTS, tile.rows)
    scale_rows = fp8_launch.scale_rows(tensor(rows, HIDDEN, dtype=dtype), rows_in)
    scale = tensor(EXPERTS, 2 * WIDTH, dtype=torch.float32)
    gate_up_proj = tensor(*arranged_shape((EXPERTS, 2 * WIDTH, HIDDEN), 2))
    down_proj = tensor(*arranged_shape((EXPERTS, HIDDEN, WIDTH), 1))
    gate_up = fp8_launch.gate_up(*scale_rows.outputs, gate_up_proj, scale, *align.outputs, TOP_K, tile, dtype)
    scale_activated = fp8_launch.scale_rows(*gate_up.outputs, rows_in)
    scale, top_k_weights = tensor(EXPERTS, HIDDEN, dtype=torch.float32), tensor(rows, TOP_K, dtype=torch.float32)
    down_tile = fp8_launch.choose_down_tile(tile)
    rows_read = (*scale_activated.outputs, down_proj, scale, top_k_weights)
    down = fp8_launch.down(*rows_read, *align.outputs, down_tile, dtype)
    assert down.outputs[0].shape == (rows * TOP_K, HIDDEN)
    return dict(zip(STAGES, (scale_rows, gate_up, scale_activated, down), strict=True))


@pytest.mark.parametrize("fp8_rows", [False, True], ids=["full rows", "FP8 rows"])
@pytest.mark.parametrize(
    ("rows", "name"),
    [*((256, stage) for stage in STAGES), *((rows, stage) for rows in (1024, 16384) for stage in ("gate_up", "down"))],
)
def test_compiles(rows, fp8_rows, name, tmp_path):
    described = launches(rows, fp8_rows)[name]
    instructions = check_compiles(described, tmp_path, f"{rows} rows, {'FP8' if fp8_rows else 'full'} rows")
    if name not in ("gate_up", "down"):
        return
    ptx = described.compile(HOPPER).asm["ptx"]
    assert instructions["cp.async.cg"], "no 16-byte asynchronous copies"
    # FP8 matrix instructions, or float16 ones whose FP8 weights are converted two at a time.
    factors = "f32.e4m3.e4m3" if fp8_rows else "f32.f16.f16"
    assert ptx.count(factors) == instructions["wgmma.mma_async"] > 0
    assert ("cvt.rn.f16x2.e4m3x2" in ptx) == (not fp8_rows)
    assert "cvt.bf16.f16" not in ptx
    check_weights_stay_in_their_threads(ptx)
    check_factors_stay_until_they_are_read(tmp_path / "kernel.cubin")


@pytest.mark.parametrize(
    ("rows", "tile", "grid"),
    [(1024, fp8_launch.SOME_FP8_ROWS, (2, 254)), (16384, fp8_launch.MANY_FP8_ROWS, (2, 1151))],
    ids=["1024 rows", "16384 rows"],
)
def test_second_product_for_hopper_compiles(rows, tile, grid, tmp_path):
    """Its two groups of warps are each as one of Triton's programs. 704 columns are five steps of 128 and one of 64."""
    numbers, scale, down_proj, *others = launches(rows, True)["down"].inputs
    words = torch.empty(*down_proj.shape[:2], down_proj.shape[2] // 4, dtype=torch.int32, device="meta")
    described = fp8_launch.down(
        numbers, scale, words, *others, hopper_tile(words, tile), torch.bfloat16, hopper_down_fp8_kernel
    )
    assert described.grid == grid
    instructions = check_compiles(described, tmp_path, f"{rows} rows", groups=2)
    ptx = described.compile(HOPPER).asm["ptx"]
    assert ptx.count("f32.e4m3.e4m3") == instructions["wgmma.mma_async"] == 2 * (5 * 4 + 2)
    assert instructions["cp.async.cg"], "no 16-byte asynchronous copies"
    assert "prmt" not in ptx, "numbers are taken apart and put together again"
    check_weights_stay_in_their_threads(ptx)
    check_factors_stay_until_they_are_read(tmp_path / "kernel.cubin")


def test_second_product_of_full_rows_for_hopper_compiles(tmp_path):
    """A step converts 32 numbers a thread, in pairs; one factor is made before the first step."""
    rows, scale, down_proj, *others = launches(16384, False)["down"].inputs
    words = torch.empty(*down_proj.shape[:2], down_proj.shape[2] // 4, dtype=torch.int32, device="meta")
    tile = hopper_tile(words, fp8_launch.MANY_ROWS)
    described = fp8_launch.down(rows, scale, words, *others, tile, torch.bfloat16, hopper_down_wide_kernel)
    assert described.grid == (2, 1151)
    instructions = check_compiles(described, tmp_path, "16384 rows", groups=2)
    ptx = described.compile(HOPPER).asm["ptx"]
    assert ptx.count("f32.f16.f16") == instructions["wgmma.mma_async"] == 2 * 11 * 4
    assert ptx.count("cvt.rn.f16x2.e4m3x2") == 2 * (11 + 1) * 16
    assert "prmt" not in ptx, "numbers are taken apart and put together again"
    check_weights_stay_in_their_threads(ptx)
    check_factors_stay_until_they_are_read(tmp_path / "kernel.cubin")
