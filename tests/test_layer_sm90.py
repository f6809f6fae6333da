"""The kernels around the products of a layer compile for Hopper at the real model's shapes, on a machine without a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from hopper import check_compiles

from plugins.feed_forward.launch import enter_launch, leave_launch
from plugins.feed_forward.mlp_launch import activate_launch, down_launch, gate_up_launch
from plugins.feed_forward.spread import fetch_launch
from plugins.heads.launch import heads_launch
from plugins.moe.kinds import RowsForm
from plugins.moe.packing import ROW_FACTOR

HIDDEN, WIDTH, TOP_K, EPS = 2816, 2112, 8, 1e-6


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(("num_kv_heads", "has_values", "head_dim"), [(8, True, 256), (2, False, 512)])
def test_heads_compile(num_kv_heads, has_values, head_dim, tmp_path):
    cos, norm = meta(256, 1, head_dim), meta(head_dim)
    heads = meta(256, (16 + num_kv_heads * (1 + has_values)) * head_dim)
    launch = heads_launch(heads, norm, norm, cos, cos, num_kv_heads, has_values, EPS)
    assert check_compiles(launch, tmp_path, f"head_dim {head_dim}")["ld.global.v4"]


@pytest.mark.parametrize(
    "form",
    [
        RowsForm(torch.bfloat16),
        RowsForm(torch.bfloat16, factor=ROW_FACTOR),
        RowsForm(torch.float16, scaled=True),
        RowsForm(torch.float8_e4m3fn, scaled=True),
    ],
    ids=str,
)
def test_enter_compiles(form, tmp_path):
    launch = enter_launch(meta(256, HIDDEN), meta(256, HIDDEN), [meta(HIDDEN)] * 3, meta(HIDDEN), form, EPS)
    assert check_compiles(launch, tmp_path, str(form))["ld.global.v4"]


@pytest.mark.parametrize("scalars", [1, 256])
def test_leave_compiles(scalars, tmp_path):
    rows, norms = meta(256, HIDDEN), [meta(HIDDEN)] * 4
    launch = leave_launch(rows, rows, meta(256 * TOP_K, HIDDEN), meta(scalars), norms, TOP_K, EPS)
    assert check_compiles(launch, tmp_path, "leave")["ld.global.v4"]


def test_fetching_compiles(tmp_path):
    rows = meta(256, HIDDEN // 2, dtype=torch.int32), meta(256, 1, dtype=torch.float32)
    chosen = meta(256, TOP_K, dtype=torch.int64), meta(256, TOP_K, dtype=torch.float32)
    there = torch.device("meta")
    assert check_compiles(fetch_launch(*rows, 0, there), tmp_path, "rows")["ld.global.v4"]
    check_compiles(fetch_launch(*chosen, 64, there), tmp_path, "chosen")


def test_the_mlp_compiles(tmp_path):
    gate_up = gate_up_launch(meta(256, HIDDEN), meta(2 * WIDTH, HIDDEN))
    assert gate_up.grid == (33, 2)
    down = down_launch(*gate_up.outputs, meta(HIDDEN, WIDTH))
    assert down.grid == (22, 2)
    for launch in (gate_up, down):
        instructions = check_compiles(launch, tmp_path, "MLP of 256 rows")
        assert {"wgmma.mma_async", "cp.async.cg"} <= instructions.keys()
    assert check_compiles(activate_launch(meta(1024, 2 * WIDTH)), tmp_path, "MLP of 1024 rows")["ld.global.v4"]
