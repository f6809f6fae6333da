"""Top-k, top-p and min-p on the device: which rows are drawn again, and what of; see `plugins.vocabulary.filter_kernel`."""

import torch
from torch import Tensor

from plugins.triton_launch import Launch
from plugins.vocabulary.filter_kernel import filtered_sample_kernel
from plugins.vocabulary.launch import block_columns
from plugins.vocabulary.tables import Adjustment, Filters

BLOCK_COLUMNS, NUM_WARPS = 1024, 8
"""Of a program that reads a whole row. NVIDIA H200, Triton 3.6, 256 flat rows, top_k 64 / top_p 0.95 / 20 log probabilities:
610 / 622 / 348 µs; 2048 columns: 631 / 569 / 522; 4096, 16 warps: 974 / 337 / 477; 4 warps: 674 / 659 / 438."""


def filter_samples(
    raw_logits: Tensor,
    sampled: Tensor,
    filters: Filters,
    *,
    cap: float | None,
    temperature: Tensor,
    adjustment: Adjustment,
    argmax: Tensor,
    seeds: Tensor,
    canvas_indices: Tensor,
    steps: Tensor,
    positions: Tensor,
) -> None:
    """Draws `sampled` [R] int64 again, in place, where the filters of its slot, in `adjustment.slots`, do not let it through.

    raw_logits: [R, V], contiguous. sampled, argmax: what `vocabulary_pass` made of them and of the other arguments.
    """
    per_row = (temperature, *adjustment, argmax, seeds, canvas_indices, steps, positions, *filters)
    filter_launch((raw_logits, *(each.contiguous() for each in per_row)), sampled, cap).run()


def filter_launch(inputs: tuple[Tensor, ...], sampled: Tensor, cap: float | None) -> Launch:
    """inputs: raw_logits, temperature, the adjustment's, argmax, seeds, canvas_indices, steps, positions, top_k, top_p,
    min_p. Outputs lists, for the kernel alone, and sampled, overwritten."""
    num_rows, vocab_size = inputs[0].shape
    columns = block_columns(BLOCK_COLUMNS, vocab_size)
    if sampled.dtype != torch.int64 or not sampled.is_contiguous():
        raise ValueError(f"sampled: got {sampled.dtype} with strides {sampled.stride()}, expected contiguous int64")
    return Launch(
        kernel=filtered_sample_kernel,
        grid=(num_rows,),
        inputs=inputs,
        scalars=(),
        outputs=(inputs[0].new_empty(num_rows, columns, dtype=torch.int32), sampled),
        constants={"VOCAB_SIZE": vocab_size, "CAP": float(cap or 0), "BLOCK": columns},
        num_warps=NUM_WARPS,
        num_stages=1,
    )
