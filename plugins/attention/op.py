"""`diffusiongemma::paged_attention`, the attention operator as programs call it (see the package's docstring)."""

import torch

from plugins.attention.cpu import paged_attention_cpu
from plugins.library import LIBRARY

LIBRARY.define(
    "paged_attention(Tensor query, Tensor new_kv, Tensor kv_pages, Tensor page_table, Tensor prefix_lengths, "
    "Tensor sequence_starts, Tensor image_block_ids, bool causal, int window) -> Tensor"
)
LIBRARY.impl("paged_attention", paged_attention_cpu, "CPU")


@torch.library.register_fake("diffusiongemma::paged_attention", lib=LIBRARY)
def _(query, new_kv, kv_pages, page_table, prefix_lengths, sequence_starts, image_block_ids, causal, window):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


paged_attention = torch.ops.diffusiongemma.paged_attention.default

if torch.version.cuda:  # CPU builds of PyTorch come without triton, and have no use for it
    from plugins.attention import cuda  # noqa: F401
