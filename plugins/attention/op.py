"""`diffusiongemma::paged_attention`, the attention operator as programs call it (see the package's docstring).

`paged_attention_in_splits` is the same with a given number of programs that share a tile's keys, where the former has as many
as fill the device: then a row does not depend on what else is in the pass (`plugins.batch_invariance`).
"""

import torch

from plugins.attention.cpu import paged_attention_cpu as paged_attention_eager
from plugins.library import LIBRARY

_ARGUMENTS = (
    "Tensor query, Tensor new_kv, Tensor kv_pages, Tensor page_table, Tensor prefix_lengths, "
    "Tensor sequence_starts, Tensor image_block_ids, bool causal, int window"
)
LIBRARY.define(f"paged_attention({_ARGUMENTS}) -> Tensor")
LIBRARY.impl("paged_attention", paged_attention_eager, "CPU")
LIBRARY.define(f"paged_attention_in_splits({_ARGUMENTS}, int num_splits) -> Tensor")
LIBRARY.impl("paged_attention_in_splits", lambda *inputs: paged_attention_eager(*inputs[:-1]), "CPU")
LIBRARY.define(f"paged_attention_cpu({_ARGUMENTS}) -> Tensor")  # in C++, float32; see `plugins.cpu`


@torch.library.register_fake("diffusiongemma::paged_attention", lib=LIBRARY)
@torch.library.register_fake("diffusiongemma::paged_attention_in_splits", lib=LIBRARY)
@torch.library.register_fake("diffusiongemma::paged_attention_cpu", lib=LIBRARY)
def _(query, *others):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


paged_attention = torch.ops.diffusiongemma.paged_attention.default
paged_attention_in_splits = torch.ops.diffusiongemma.paged_attention_in_splits.default
paged_attention_cpu = torch.ops.diffusiongemma.paged_attention_cpu.default

if torch.version.cuda:  # CPU builds of PyTorch come without triton, and have no use for it
    from plugins.attention import cuda  # noqa: F401
