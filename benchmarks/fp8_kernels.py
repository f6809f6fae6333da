"""The experts with FP8 weights at the real model's shapes on a GPU, as `kernels.py` measures the other kernels.

"full rows" are multiplied in float16 with a power of two for each row, "FP8 rows" in e4m3 with a scale for each.
"""

from collections.abc import Iterator
from functools import cache, partial

import torch
from kernel_tiles import arranged_tiles
from kernels import (
    EXPERTS,
    HIDDEN,
    MAX_RELATIVE_ERROR,
    TOP_K,
    WIDTH,
    Case,
    Maker,
    benchmark,
    expert_weights,
    relative_error,
)

from plugins.moe.arranging import arrange
from plugins.moe.fp8 import from_fp8, to_fp8
from plugins.moe.fp8_launch import experts_fp8
from plugins.moe.launch import Tile

MAX_FP8_ROWS_ERROR = 6e-2
"""Of rows rounded to FP8, as hidden and as activated: 2.6 % each time in the root mean square of uniform mantissas, and what
hidden gets comes in through gate and through up."""


@cache
def quantised_weights() -> tuple[torch.Tensor, ...]:
    """gate_up_proj, its scale, down_proj, its scale."""
    return tuple(tensor for weight in expert_weights(None)[0] for tensor in to_fp8(weight))


@cache
def arranged_weights(fp8_rows: bool) -> tuple[torch.Tensor, ...]:
    """The same, as the kernels take them."""
    gate_up, gate_up_scale, down, down_scale = quantised_weights()
    return (
        arrange(gate_up, halves=2, narrow=fp8_rows),
        gate_up_scale,
        arrange(down, halves=1, narrow=fp8_rows),
        down_scale,
    )


@cache
def problem(rows: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The operator's inputs, and what to expect of the first 64 rows with these weights and rows as they are."""
    hidden = torch.randn(rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    index = torch.rand(rows, EXPERTS, device="cuda").topk(TOP_K).indices
    weights = torch.rand(rows, TOP_K, device="cuda")
    gate_up, gate_up_scale, down, down_scale = quantised_weights()
    expected = torch.zeros(min(rows, 64), HIDDEN, device="cuda")
    for row, chosen in enumerate(index[:64].tolist()):
        for slot, expert in enumerate(chosen):
            gate, up = (from_fp8(gate_up[expert], gate_up_scale[expert]) @ hidden[row].float()).chunk(2)
            activated = torch.nn.functional.gelu(gate, approximate="tanh") * up
            expected[row] += weights[row, slot] * (from_fp8(down[expert], down_scale[expert]) @ activated)
    return (hidden, index, weights), expected


def case(rows: int, fp8_rows: bool, **options: Tile) -> Case:
    inputs, expected = problem(rows)
    inputs = (*inputs, *arranged_weights(fp8_rows))
    result = experts_fp8(*inputs, fp8_rows, **options)
    return Case(
        name=f"FP8 experts, {'FP8' if fp8_rows else 'full'} rows, {rows} rows",
        calls=[partial(experts_fp8, *inputs, fp8_rows, **options)] * 4,
        flops=rows * TOP_K * 6 * WIDTH * HIDDEN,
        bytes=inputs[1].unique().numel() * 3 * WIDTH * HIDDEN + 2 * 2 * rows * HIDDEN,
        error=relative_error(result[:64], expected),
        max_error=MAX_FP8_ROWS_ERROR if fp8_rows else MAX_RELATIVE_ERROR,
    )


def makers() -> Iterator[Maker]:
    for rows in (256, 1024, 8192, 512, 2048):
        for fp8_rows in (False, True):
            yield partial(case, rows, fp8_rows)


def other_tiles(maker: Maker) -> Iterator[dict[str, object]]:
    for tile in arranged_tiles(*maker.args):
        yield {"tile": tile, "down_tile": tile}


if __name__ == "__main__":
    benchmark("fp8_kernels", __doc__, makers(), other_tiles, (problem,))
