"""The feed-forward operator as programs call it (see the package's docstring)."""

import torch

from plugins.feed_forward.reference import feed_forward_reference
from plugins.library import LIBRARY

__all__ = ["feed_forward"]

LIBRARY.define(
    "feed_forward(Tensor hidden, Tensor attended, Tensor[] norms, Tensor scalar, Tensor[] dense, Tensor[] router, "
    "Tensor[] experts, int top_k, float eps, bool fp8_rows) -> (Tensor, Tensor)"
)
LIBRARY.impl("feed_forward", feed_forward_reference, "CPU")


@torch.library.register_fake("diffusiongemma::feed_forward", lib=LIBRARY)
def _(hidden, attended, norms, scalar, dense, router, experts, top_k, eps, fp8_rows):
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)


feed_forward = torch.ops.diffusiongemma.feed_forward.default

PLAIN_DECOMPOSITIONS = {feed_forward: feed_forward_reference}
"""For compilers that do the operator as well from its definition."""

if torch.version.cuda:  # CPU builds of PyTorch come without triton, and have no use for it
    from plugins.feed_forward import cuda  # noqa: F401
