"""`diffusiongemma::paged_attention`, the attention operator as programs call it (see the package's docstring)."""

import torch

from plugins.attention.cpu import paged_attention_cpu as paged_attention_eager
from plugins.library import LIBRARY

_SCHEMA = (
    "(Tensor query, Tensor new_kv, Tensor kv_pages, Tensor page_table, Tensor prefix_lengths, "
    "Tensor sequence_starts, Tensor image_block_ids, bool causal, int window) -> Tensor"
)
LIBRARY.define(f"paged_attention{_SCHEMA}")
LIBRARY.impl("paged_attention", paged_attention_eager, "CPU")
LIBRARY.define(f"paged_attention_cpu{_SCHEMA}")  # in C++, float32; see `plugins.cpu`


@torch.library.register_fake("diffusiongemma::paged_attention", lib=LIBRARY)
@torch.library.register_fake("diffusiongemma::paged_attention_cpu", lib=LIBRARY)
def _(query, new_kv, kv_pages, page_table, prefix_lengths, sequence_starts, image_block_ids, causal, window):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


paged_attention = torch.ops.diffusiongemma.paged_attention.default
paged_attention_cpu = torch.ops.diffusiongemma.paged_attention_cpu.default

if torch.version.cuda:  # CPU builds of PyTorch come without triton, and have no use for it
    from plugins.attention import cuda  # noqa: F401
