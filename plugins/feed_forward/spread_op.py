"""`diffusiongemma::feed_forward_spread`: the feed-forward operator where several GPUs share a layer's experts.

experts: those of the first GPU, then those of the next, …: each GPU has as many, in order, in tensors of its own; all else is
on the first. Routed rows go to the GPU that has their expert, which puts its results where the first one sums them: every bit
is what one GPU with all experts would give. `spread` is how it runs on GPUs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from plugins.feed_forward.reference import feed_forward_reference
from plugins.library import LIBRARY

__all__ = ["feed_forward_spread", "parts_of"]

LIBRARY.define(
    "feed_forward_spread(Tensor hidden, Tensor attended, Tensor[] norms, Tensor scalar, Tensor[] dense, Tensor[] router, "
    "Tensor[] experts, int num_gpus, int top_k, float eps, bool fp8_rows) -> (Tensor, Tensor)"
)


def parts_of(experts: Sequence[Tensor], num_gpus: int) -> list[Sequence[Tensor]]:
    """The tensors of each GPU."""
    count = len(experts) // num_gpus
    return [experts[start : start + count] for start in range(0, len(experts), count)]


def _on_one_device(*arguments) -> tuple[Tensor, Tensor]:
    """The definition. arguments: the operator's, in order."""
    *given, experts, num_gpus, top_k, eps, fp8_rows = arguments
    whole = [torch.cat(parts) for parts in zip(*parts_of(experts, num_gpus), strict=True)]
    return feed_forward_reference(*given, whole, top_k, eps, fp8_rows)


LIBRARY.impl("feed_forward_spread", _on_one_device, "CPU")


@torch.library.register_fake("diffusiongemma::feed_forward_spread", lib=LIBRARY)
def _(hidden, *others):
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)


feed_forward_spread = torch.ops.diffusiongemma.feed_forward_spread.default

if torch.version.cuda:
    from plugins.feed_forward import spread_cuda  # noqa: F401
