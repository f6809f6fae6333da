"""Every kernel of the mixture of experts compiles for Hopper at the real model's shapes, on a machine without a GPU.

Run with `-s` to see registers, shared memory and instructions of each.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from hopper import check_compiles

from plugins.moe import alignment, launch
from plugins.triton_launch import Launch

HIDDEN, WIDTH, EXPERTS, TOP_K = 2816, 704, 128, 8
PIPELINE = ["router_logits", "router", "align", "gate_up", "down", "combine"]


def launches(rows: int, dtype: torch.dtype) -> dict[str, Launch]:
    """The whole pipeline on meta tensors, each kernel's outputs the next one's inputs."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tile = launch.choose_tile(rows, TOP_K, EXPERTS, dtype)
    router_logits = launch.router_logits(tensor(rows, HIDDEN), tensor(EXPERTS, HIDDEN))
    router = launch.router(*router_logits.outputs, tensor(EXPERTS), TOP_K, dtype)
    top_k_weights, top_k_index = router.outputs
    align = alignment.align(top_k_index, EXPERTS, tile.rows)
    gate_up = launch.gate_up(tensor(rows, HIDDEN), tensor(EXPERTS, 2 * WIDTH, HIDDEN), *align.outputs, TOP_K, tile)
    down = launch.down(
        *gate_up.outputs, tensor(EXPERTS, HIDDEN, WIDTH), top_k_weights, *align.outputs, launch.choose_down_tile(tile)
    )
    combine = launch.combine(*down.outputs, TOP_K)
    assert combine.outputs[0].shape == (rows, HIDDEN)
    return dict(zip(PIPELINE, (router_logits, router, align, gate_up, down, combine), strict=True))


@pytest.mark.parametrize("name", PIPELINE)
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [(256, torch.bfloat16), (1024, torch.bfloat16), (16384, torch.bfloat16), (256, torch.float32)],
    ids=lambda each: str(each),
)
def test_compiles(rows, dtype, name, tmp_path):
    instructions = check_compiles(launches(rows, dtype)[name], tmp_path, f"{rows} rows, {dtype}")
    if name in ("router_logits", "gate_up", "down") and dtype == torch.bfloat16:
        assert "wgmma.mma_async" in instructions, "no tensor cores, or not Hopper's way of using them"
        assert "cp.async.cg" in instructions, "no 16-byte asynchronous copies"


def test_ordering_in_chunks_compiles(tmp_path):
    top_k_index = torch.empty(16384, TOP_K, dtype=torch.int64, device="meta")
    count = alignment.count(top_k_index, EXPERTS)
    scan = alignment.scan(*count.outputs, launch.MANY_ROWS.rows)
    place = alignment.place(top_k_index, *scan.outputs, EXPERTS, launch.MANY_ROWS.rows)
    assert [each.shape for each in place.outputs] == [(1151 * 128,), (1151,)]
    for each in (count, scan, place):
        check_compiles(each, tmp_path, "16384 rows")


def test_grids_and_scratch_at_the_real_sizes():
    few, many = launches(256, torch.bfloat16), launches(16384, torch.bfloat16)
    assert few["align"].scalars == (2048, 188)
    assert few["gate_up"].grid == (11, 188)
    assert few["down"].grid == (22, 188)
    assert few["combine"].grid == (256, 3)
    assert many["align"].scalars == (131072, 1151)
    assert many["down"].grid == (11, 1151)
    assert many["gate_up"].outputs[0].shape == (131072, 704)


def test_a_launch_that_is_not_the_kernels_is_refused():
    described = launches(256, torch.bfloat16)["combine"]
    with pytest.raises(ValueError, match=r"combine_kernel: after 3 inputs, scalars and outputs come the arguments \['TOP_K'"):
        replace(described, scalars=(256,)).signature()
