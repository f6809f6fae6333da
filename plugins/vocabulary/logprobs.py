"""Log probabilities on the device, of the rows that want them; see `plugins.vocabulary.logprobs_kernel`."""

import torch
from torch import Tensor

from plugins.triton_launch import Launch
from plugins.vocabulary.filters import BLOCK_COLUMNS, NUM_WARPS
from plugins.vocabulary.launch import block_columns, power_of_two
from plugins.vocabulary.logprobs_kernel import logprobs_kernel
from plugins.vocabulary.tables import Adjustment, LogprobTables


def record_logprobs(
    raw_logits: Tensor,
    tables: LogprobTables,
    *,
    cap: float | None,
    temperature: Tensor,
    adjustment: Adjustment,
    argmax: Tensor,
    logprob: Tensor,
    positions: Tensor,
) -> None:
    """Writes the tables of the slots in `adjustment.slots`, in place.

    raw_logits: [R, V], contiguous. argmax, logprob: what `vocabulary_pass` made of the logits and of the other arguments.
    """
    per_row = (temperature, *adjustment, argmax, logprob, positions, tables.counts)
    logprobs_launch((raw_logits, *(each.contiguous() for each in per_row)), tables[1:], cap).run()


def logprobs_launch(inputs: tuple[Tensor, ...], written: tuple[Tensor, ...], cap: float | None) -> Launch:
    """inputs: raw_logits, temperature, the adjustment's, argmax, logprob, positions, counts. written: the tables' others.
    Outputs lists, tokens and values as they are found, all for the kernel alone, and `written`."""
    if not all(each.is_contiguous() for each in written):
        raise ValueError(f"tables: got strides {[each.stride() for each in written]}, expected contiguous tensors")
    raw_logits = inputs[0]
    num_rows, vocab_size = raw_logits.shape
    _, canvas_length, most = written[1].shape
    columns = block_columns(BLOCK_COLUMNS, vocab_size)
    scratch = (
        raw_logits.new_empty(num_rows, columns, dtype=torch.int32),
        raw_logits.new_empty(num_rows, most, dtype=torch.int32),
        raw_logits.new_empty(num_rows, most, dtype=torch.float32),
    )
    return Launch(
        kernel=logprobs_kernel,
        grid=(num_rows,),
        inputs=inputs,
        scalars=(),
        outputs=(*scratch, *written),
        constants={
            "VOCAB_SIZE": vocab_size,
            "CAP": float(cap or 0),
            "CANVAS_LENGTH": canvas_length,
            "MOST": most,
            "BLOCK": columns,
            "BLOCK_MOST": power_of_two(most),
        },
        num_warps=NUM_WARPS,
        num_stages=1,
    )
