"""The operators of compiled CPU engines, in C++: float32, no Python and no copies on their way.

The builder compiles every `cpu.cpp` of the plugins into one library, `operators.so` of the engine directory, for the CPU that
it runs on. Where an engine has none (bfloat16, programs that are not compiled), the operators' `cpu.py` does their work.

| operator | source |
|---|---|
| experts_cpu | `plugins/moe/cpu.cpp` |
| paged_attention_cpu | `plugins/attention/cpu.cpp` |
| vocabulary_cpu, advance_cpu | `plugins/vocabulary/cpu.cpp` |

`vector.h` holds vectors and tiles of dot products, `philox.h` the noise.
"""

from pathlib import Path

import torch

from plugins.attention.op import paged_attention, paged_attention_cpu
from plugins.moe.op import experts, experts_cpu

SOURCES = tuple(sorted(Path(__file__).parent.parent.rglob("cpu.cpp")))
"""What `operators.so` is compiled from; includes are relative to the directory above `plugins`."""

COMPILED = {experts: experts_cpu, paged_attention: paged_attention_cpu}
"""Operator that programs are traced with → its form in `operators.so`."""


def load_operators(library: Path) -> None:
    """Makes the operators of `library` callable; nothing happens if a library of this process has them already.

    Raises:
        OSError: the file is not there, or not a library for this machine.
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key(experts_cpu.name(), "CPU"):
        torch.ops.load_library(library)
