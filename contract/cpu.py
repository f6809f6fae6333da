"""What a CPU program is compiled for: the architecture and the widest vector instructions that PyTorch uses on it."""

import platform

import torch


def this_cpu() -> str:
    """Such as "x86_64 AVX512". Programs are compiled for the CPU that they are built on, and may not run on another kind."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
