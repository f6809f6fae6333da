"""The CUDA path of the attention operator: the kernel for its device, Hopper's, where there is one for the layer, or else
Triton's. It is then known how many programs share a tile's keys, and, where it is one, nothing is left to combine.

Import this module only where triton is installed; it needs neither a GPU nor a CUDA build of PyTorch.
"""

import torch
from torch import Tensor

from plugins.attention.hopper_launch import has_kernel, hopper_attention
from plugins.attention.launch import attention, choose_num_splits
from plugins.library import LIBRARY
from plugins.triton_launch import HOPPER_CAPABILITY


def paged_attention_cuda(
    query: Tensor,
    new_kv: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    prefix_lengths: Tensor,
    sequence_starts: Tensor,
    image_block_ids: Tensor,
    causal: bool,
    window: int,
) -> Tensor:
    """On the current stream, without waiting for the device."""
    inputs = (query, new_kv, kv_pages, page_table, prefix_lengths, sequence_starts, image_block_ids)
    device = torch.cuda.get_device_properties(query.device)
    num_splits = choose_num_splits(inputs, window, device.multi_processor_count)
    if (device.major, device.minor) == HOPPER_CAPABILITY and has_kernel(inputs):
        return hopper_attention(inputs, causal, window, num_splits)
    return attention(*inputs, causal, window, num_splits=num_splits)


LIBRARY.impl("paged_attention", paged_attention_cuda, "CUDA")
