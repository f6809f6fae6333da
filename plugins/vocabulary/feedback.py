"""Self-conditioning's feedback on the device: a step's logits → the next step's soft embeddings, nothing else of their size.

Everything here works on CUDA tensors and on CPU tensors in Triton's interpreter; launches can be described on meta tensors.
"""

import torch
from torch import Tensor

from plugins.triton_launch import Launch
from plugins.vocabulary.feedback_kernel import softmax_weights_kernel
from plugins.vocabulary.launch import block_columns
from plugins.vocabulary.tables import Adjustment

# NVIDIA H200, Triton 3.6, 256 / 2,048 rows of 262,144 columns: 111 / 863 µs; 1024 columns, 2 warps: 112 / 863; 4096, 8 warps:
# 116 / 915; 8192, 16 warps: 134 / 1,067; 1024, 4 warps: 135 / 1,042.
_TILE_COLUMNS, _TILE_WARPS = 2048, 4


def soft_embeddings(
    raw_logits: Tensor,
    *,
    cap: float | None,
    temperature: Tensor,
    argmax: Tensor,
    embedding: Tensor,
    embed_scale: float,
    adjustment: Adjustment | None = None,
    given: Tensor | None = None,
    rows_at_once: int | None = None,
) -> Tensor:
    """The mean of the token embeddings under the softmax of the processed logits, times embed_scale: [R, D].

    raw_logits: [R, V], contiguous, OVERWRITTEN. temperature: [R] float32. argmax: [R] int64, the most likely tokens. embedding:
    [V, D] in the dtype of the logits and of the result. embed_scale is rounded to that dtype, the product is summed in float32.
    given: [R] int64, of each row the only token that is possible, or a negative number; None gives none. rows_at_once: of a
    product with the embedding, None all; see `_mixed`.
    """
    largest = raw_logits.gather(1, argmax[:, None])
    given = torch.full_like(argmax, -1) if given is None else given
    per_row = (temperature, *(adjustment or Adjustment.none(raw_logits)), largest, argmax, given)
    weights, totals = weights_launch(raw_logits, tuple(each.contiguous() for each in per_row), cap).run()
    mixed = _mixed(weights, embedding, rows_at_once or weights.shape[0])
    scale = torch.tensor(embed_scale).to(weights.dtype).item()
    return (mixed * (scale / totals.sum(dim=1, keepdim=True))).to(weights.dtype)


def _mixed(weights: Tensor, embedding: Tensor, rows_at_once: int) -> Tensor:
    """weights [R, V] times embedding [V, D], summed in float32.

    PyTorch's library divides so long a sum among programs in a way that depends on the number of rows: what a row gets from the
    product depends on who else is in it. NVIDIA H200, the 26B shape, 256 / 512 / 1,024 / 2,048 rows at once: 0.55 / 1.05 /
    2.70 / 4.51 ms; 256 at a time 0.55 / 1.09 / 2.30 / 4.51.
    """
    mixed = weights.new_empty(weights.shape[0], embedding.shape[1], dtype=torch.float32)
    for rows, result in zip(weights.split(rows_at_once), mixed.split(rows_at_once), strict=True):
        if weights.dtype == torch.float32:
            torch.mm(rows, embedding, out=result)
        elif weights.is_cuda:
            torch.mm(rows, embedding, out_dtype=torch.float32, out=result)
        else:
            torch.mm(rows.float(), embedding.float(), out=result)
    return mixed


def weights_launch(raw_logits: Tensor, inputs: tuple[Tensor, ...], cap: float | None) -> Launch:
    """inputs: temperature, the adjustment's, the largest raw logits, the most likely tokens, given ones. Outputs raw_logits,
    overwritten by the softmax's weights, and totals [R, S] float32, their sums by tile."""
    num_rows, vocab_size = raw_logits.shape
    columns = block_columns(_TILE_COLUMNS, vocab_size)
    num_tiles = -(-vocab_size // columns)
    return Launch(
        kernel=softmax_weights_kernel,
        grid=(num_rows, num_tiles),
        inputs=inputs,
        scalars=(),
        outputs=(raw_logits, raw_logits.new_empty(num_rows, num_tiles, dtype=torch.float32)),
        constants={"VOCAB_SIZE": vocab_size, "CAP": float(cap or 0), "BLOCK": columns},
        num_warps=_TILE_WARPS,
        num_stages=1,
    )
