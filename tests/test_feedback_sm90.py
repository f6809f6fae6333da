"""The kernel of the soft embeddings compiles for Hopper at the real model's shape, on a machine without a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from hopper import check_compiles, described_adjustment

from plugins.vocabulary.feedback import weights_launch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_softmax_weights_compile(dtype, tmp_path):
    logits = torch.empty(256, 262144, dtype=dtype, device="meta")
    per_row = torch.empty(256, dtype=torch.int64, device="meta")
    inputs = (torch.empty(256, device="meta"), *described_adjustment(5, 262144, 256), logits[:, :1], per_row, per_row)
    launch = weights_launch(logits, inputs, 30.0)
    assert launch.grid == (256, 128)
    assert check_compiles(launch, tmp_path, str(dtype))["ld.global.v4"]
