"""The attention operator, open to compilers.

A compiler sees through `diffusiongemma::paged_attention_triton`, not through `diffusiongemma::paged_attention`, whose node
must stay whole for the targets that have an implementation of their own. A program is opened for it by

    exported.run_decompositions(CUDA_DECOMPOSITIONS)

and Triton's kernels are then compiled into the package. Apart from `cuda`, because whoever only runs programs does without
PyTorch's compiler, whose import takes seconds.
"""

from torch import Tensor
from torch.library import triton_op, wrap_triton

from plugins.attention.launch import HOPPER_MULTIPROCESSORS, attention, choose_num_splits
from plugins.attention.op import paged_attention


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


CUDA_DECOMPOSITIONS = {paged_attention: paged_attention_triton}
