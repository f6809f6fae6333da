"""The CUDA path of the attention operator: its kernels, called directly or traced into a compiled program.

A program that calls the operator has the kernel for its device: Hopper's, where there is one for the layer, or else Triton's.
It is then known how many programs share a tile's keys, and, where it is one, nothing is left to combine.

A compiler sees through `diffusiongemma::paged_attention_triton`, not through `diffusiongemma::paged_attention`, whose node
must stay whole for the targets that have an implementation of their own. A program is opened for it by

    exported.run_decompositions(CUDA_DECOMPOSITIONS)

and Triton's kernels are then compiled into the package. Import this module only where triton is installed; it needs neither a
GPU nor a CUDA build of PyTorch.
"""

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from plugins.attention.hopper_launch import has_kernel, hopper_attention
from plugins.attention.launch import HOPPER_MULTIPROCESSORS, attention, choose_num_splits
from plugins.library import LIBRARY
from plugins.triton_launch import HOPPER_CAPABILITY


@triton_op("diffusiongemma::paged_attention_triton", mutates_args={})
def paged_attention_triton(
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
    """As `paged_attention`, open to compilers. With symbolic shapes the number of splits is an expression of them."""
    inputs = (query, new_kv, kv_pages, page_table, prefix_lengths, sequence_starts, image_block_ids)
    num_splits = choose_num_splits(inputs, window, HOPPER_MULTIPROCESSORS)
    return attention(*inputs, causal, window, num_splits=num_splits, wrap=wrap_triton)


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

CUDA_DECOMPOSITIONS = {torch.ops.diffusiongemma.paged_attention.default: paged_attention_triton}
