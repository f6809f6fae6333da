"""Self-conditioning's feedback on the device: a step's logits → the next step's soft embeddings, nothing else of their size.

Everything here works on CUDA tensors and on CPU tensors in Triton's interpreter; launches can be described on meta tensors.
"""

import torch
from torch import Tensor

from plugins.triton_launch import Launch
from plugins.vocabulary.feedback_kernel import softmax_weights_kernel

_TILE_COLUMNS, _TILE_WARPS = 4096, 8  # as the vocabulary pass, whose loads and soft cap these are


def soft_embeddings(
    raw_logits: Tensor,
    *,
    cap: float | None,
    temperature: Tensor,
    argmax: Tensor,
    embedding: Tensor,
    embed_scale: float,
) -> Tensor:
    """The mean of the token embeddings under softmax(soft_cap(raw_logits) / temperature), times embed_scale: [R, D].

    raw_logits: [R, V], contiguous, OVERWRITTEN. temperature: [R] float32. argmax: [R] int64, the most likely tokens. embedding:
    [V, D] in the dtype of the logits and of the result. embed_scale is rounded to that dtype, the product is summed in float32.
    """
    largest = raw_logits.gather(1, argmax[:, None])
    weights, totals = weights_launch(raw_logits, temperature.contiguous(), largest, cap).run()
    if weights.dtype == torch.float32:
        mixed = weights @ embedding
    elif weights.is_cuda:
        mixed = torch.mm(weights, embedding, out_dtype=torch.float32)
    else:
        mixed = weights.float() @ embedding.float()
    scale = torch.tensor(embed_scale).to(weights.dtype).item()
    return (mixed * (scale / totals.sum(dim=1, keepdim=True))).to(weights.dtype)


def weights_launch(raw_logits: Tensor, temperature: Tensor, largest: Tensor, cap: float | None) -> Launch:
    """Outputs raw_logits, overwritten by the softmax's weights, and totals [R, S] float32, their sums by tile."""
    num_rows, vocab_size = raw_logits.shape
    columns = min(_TILE_COLUMNS, 1 << (max(vocab_size, 16) - 1).bit_length())
    num_tiles = -(-vocab_size // columns)
    return Launch(
        kernel=softmax_weights_kernel,
        grid=(num_rows, num_tiles),
        inputs=(temperature, largest),
        scalars=(),
        outputs=(raw_logits, raw_logits.new_empty(num_rows, num_tiles, dtype=torch.float32)),
        constants={"VOCAB_SIZE": vocab_size, "CAP": float(cap or 0), "BLOCK": columns},
        num_warps=_TILE_WARPS,
        num_stages=1,
    )
