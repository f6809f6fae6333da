"""The kernels of biases, filters and log probabilities equal the plain sampler, in Triton's interpreter: see
`extras_kernel_cases.py`; and they compile for Hopper at the real model's shape, on a machine without a GPU."""

from pathlib import Path

import pytest
import torch
from interpreter_runs import check_interpreted

pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from hopper import check_compiles, described_adjustment, instructions_of

from plugins.vocabulary.filters import filter_launch
from plugins.vocabulary.logprobs import logprobs_launch

ROWS, SLOTS, VOCAB_SIZE, CANVAS_LENGTH, MOST = 1024, 65, 262_144, 256, 20


def test_kernels_equal_the_plain_sampler():
    check_interpreted("extras_kernel_cases.py")


def described(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def processed_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """raw_logits, temperature and the adjustment's."""
    adjustment = described_adjustment(SLOTS, VOCAB_SIZE, ROWS)
    return described(ROWS, VOCAB_SIZE, dtype=dtype), described(ROWS, dtype=torch.float32), *adjustment


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_filters_compile(dtype, tmp_path):
    number = described(SLOTS, dtype=torch.float32)
    inputs = (*processed_inputs(dtype), *[described(ROWS)] * 5, described(SLOTS), number, number)
    assert check_compiles(filter_launch(inputs, described(ROWS), 30.0), tmp_path, f"filters, {dtype}")["ld.global.v4"]
    check_logits_are_the_same_everywhere(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logprobs_compile(dtype, tmp_path):
    logprob = described(ROWS, dtype=torch.float32)
    inputs = (*processed_inputs(dtype), described(ROWS), logprob, described(ROWS), described(SLOTS))
    canvas = (SLOTS, CANVAS_LENGTH)
    written = (described(*canvas, dtype=logprob.dtype), described(*canvas, MOST), described(*canvas, MOST, dtype=logprob.dtype))
    assert check_compiles(logprobs_launch(inputs, written, 30.0), tmp_path, f"logprobs, {dtype}")["ld.global.v4"]
    check_logits_are_the_same_everywhere(tmp_path)


def check_logits_are_the_same_everywhere(directory: Path) -> None:
    """The kernels compare logits that different loops compute. In none is the product with the soft cap joined with the sum of
    the bias, which would round once and not twice."""
    program = [text for _, text in instructions_of(directory / "kernel.cubin")]
    assert any(text.startswith("FMUL") and text.rstrip().endswith(", 30") for text in program)
    assert not any("FFMA" in text and ", 30," in text for text in program)
