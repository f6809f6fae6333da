"""The operations that no compiler gives us, one folder an operation.

In each folder: `reference.py`, the definition in plain PyTorch; `cpu.py`, the CPU path in PyTorch's operations; `cpu.cpp`, that
of compiled engines (package `cpu`); `kernel.py`, kernels in Triton's language, with `launch.py` (grids, tiles, scratch) and
`cuda.py` (the CUDA path); `op.py`, the `torch.library` operator of the namespace `diffusiongemma` that programs call; and
`opened.py`, that operator open to compilers. Attention has another operator, in `mixed_op.py`, which calls its first twice, and
the feed-forward one for experts that several GPUs share, in `spread_op.py`.
Importing this package registers every operator but the open ones. `batch_invariance.py` says which of them give a row the same
whatever else is in a pass, and what else that takes.
"""

from plugins.attention import mixed_op
from plugins.attention import op as attention_op
from plugins.feed_forward import op as feed_forward_op
from plugins.feed_forward import spread_op
from plugins.heads import op as heads_op
from plugins.moe import op as moe_op
from plugins.vocabulary import cpu as vocabulary_op

PLUGIN_ABI = 6
"""Version of the operators' signatures; an engine built for another one is refused at load."""

PLAIN_DECOMPOSITIONS = {
    **feed_forward_op.PLAIN_DECOMPOSITIONS,
    **heads_op.PLAIN_DECOMPOSITIONS,
    **moe_op.PLAIN_DECOMPOSITIONS,
}
"""Operators that a compiler for the CPU, or TensorRT, does as well from their definitions → the definitions."""

__all__ = [
    "PLAIN_DECOMPOSITIONS",
    "PLUGIN_ABI",
    "attention_op",
    "feed_forward_op",
    "heads_op",
    "mixed_op",
    "moe_op",
    "spread_op",
    "vocabulary_op",
]
