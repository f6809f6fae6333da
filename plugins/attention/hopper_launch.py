"""How the kernel for Hopper is launched, and for which layers there is one.

`hopper_attention` is the operator, as `launch.attention` is on other devices.
"""

import torch
from torch import Tensor

from plugins.attention.hopper_kernel import hopper_attention_kernel
from plugins.attention.launch import Tile, combine_launch, contiguous, tiled_launch
from plugins.triton_launch import Launch

_HEAD_DIMS = (256, 512)
_COPIED = 8  # tokens that the kernel copies together, which must lie in one page


def has_kernel(inputs: tuple[Tensor, ...]) -> bool:
    """Whether the kernel takes the operator's inputs: bfloat16, heads of 256 or 512, pages of 8, 16, 32 … tokens."""
    query, _, kv_pages, *_ = inputs
    page_size = kv_pages.shape[1]
    whole = page_size >= _COPIED and page_size & (page_size - 1) == 0
    return whole and query.dtype == torch.bfloat16 and query.shape[2] in _HEAD_DIMS


def hopper_attention(
    inputs: tuple[Tensor, ...], causal: bool, window: int, num_splits: int, tile: Tile | None = None
) -> Tensor:
    """The operator. inputs: its seven tensors; there must be a kernel for them."""
    result, log_weights = hopper_launch(contiguous(inputs), causal, window, num_splits, tile).run()
    if num_splits == 1:
        return result[0]
    (output,) = combine_launch(result, log_weights, inputs[0].dtype).run()
    return output


def hopper_launch(inputs: tuple[Tensor, ...], causal: bool, window: int, num_splits: int, tile: Tile | None = None) -> Launch:
    """Outputs result [splits, T, H, D], float32 or, of one split, as the query; and log_weights [splits, T, H] float32."""
    query = inputs[0]
    tile = tile or choose_tile(query.shape[2])
    result = query.new_empty(num_splits, *query.shape, dtype=query.dtype if num_splits == 1 else torch.float32)
    outputs = (result, query.new_empty(result.shape[:-1], dtype=torch.float32))
    return tiled_launch(hopper_attention_kernel, inputs, causal, window, tile, outputs, num_splits)


def choose_tile(head_dim: int) -> Tile:
    """num_warps: of each of the three groups; num_stages: the kernel's own.

    NVIDIA H200, Triton 3.6, heads of 256, encoding 8,192 / 2,048 / 256 tokens: 279 / 76 / 17 µs; 32 keys: 345 / 94 / 18. Heads
    of 512 have room for 64 keys only in one buffer each, halves of the keys in turn: 1,160 µs for 767 on an H100, 4 canvases
    over 8,192 cached tokens.
    """
    return Tile(rows=128, keys=64 if head_dim == 256 else 32, columns=256, num_warps=4, num_stages=2)
