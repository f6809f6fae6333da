"""The CUDA path of the attention operator: the kernel for its device, Hopper's, where there is one for the layer, or else
Triton's. It is then known how many programs share a tile's keys, and, where it is one, nothing is left to combine.

Import this module only where triton is installed; it needs neither a GPU nor a CUDA build of PyTorch.
"""

import torch
from torch import Tensor

from plugins.attention.hopper_launch import has_kernel, hopper_attention
from plugins.attention.launch import attention, choose_num_splits
from plugins.library import LIBRARY
from plugins.triton_launch import HOPPER_CAPABILITY, multiprocessors


def paged_attention_cuda(*arguments) -> Tensor:
    """The operator. arguments: see the package's docstring. On the current stream, without waiting for the device."""
    *inputs, _, window = arguments
    splits = choose_num_splits(tuple(inputs), window, multiprocessors(inputs[0]))
    return paged_attention_in_splits_cuda(*arguments, splits)


def paged_attention_in_splits_cuda(*arguments) -> Tensor:
    """As `paged_attention_cuda`; num_splits programs share the keys of a tile."""
    *tensors, causal, window, num_splits = arguments
    inputs = tuple(tensors)
    if torch.cuda.get_device_capability(inputs[0].device) == HOPPER_CAPABILITY and has_kernel(inputs):
        return hopper_attention(inputs, causal, window, num_splits)
    return attention(*inputs, causal, window, num_splits=num_splits)


LIBRARY.impl("paged_attention", paged_attention_cuda, "CUDA")
LIBRARY.impl("paged_attention_in_splits", paged_attention_in_splits_cuda, "CUDA")
