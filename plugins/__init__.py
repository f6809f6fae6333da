"""The operations that no compiler gives us, one folder an operation.

In each folder: `reference.py`, the definition in plain PyTorch; `cpu.py`, the fast CPU path; `kernel.py`, kernels in Triton's
language, with `launch.py` (grids, tiles, scratch) and `cuda.py` (the CUDA path, open to compilers); `op.py`, the
`torch.library` operator of the namespace `diffusiongemma` that programs call. Importing this package registers every operator.
"""

from plugins.attention import op as attention_op
from plugins.moe import op as moe_op

PLUGIN_ABI = 1
"""Version of the operators' signatures; an engine built for another one is refused at load."""

__all__ = ["PLUGIN_ABI", "attention_op", "moe_op"]
