"""What the `tensorrt` target needs of the machine, and how to get it."""

import importlib
import importlib.util
import re

import torch

from contract.manifest import Device

OLDEST = (10, 14)
"""TensorRT: the first version whose ahead-of-time plugins were checked against ours."""

COMPUTE_CAPABILITY = (9, 0)
"""H100 and H200: what the kernels are compiled for."""


def missing_for_tensorrt(device: Device) -> list[str]:
    """One "what is missing; how to get it" for each need; nothing where plans can be built here for `device`."""
    missing = []
    if device != "cuda":
        missing.append("plans run on a GPU, and this build is for the CPU; use --device cuda on a machine with an H100 or H200")
    elif (here := torch.cuda.get_device_capability()) != COMPUTE_CAPABILITY:
        missing.append(
            f"{torch.cuda.get_device_name()} has compute capability {_version(here)}, the kernels are made for "
            f"{_version(COMPUTE_CAPABILITY)}; use an H100 or H200"
        )
    if importlib.util.find_spec("triton") is None:
        missing.append("triton, which compiles the kernels, is not installed; it comes with PyTorch's CUDA builds")
    try:
        found = importlib.import_module("tensorrt").__version__
    except ImportError as error:
        missing.append(f"TensorRT is not here ({error}); pip install '.[tensorrt]'")
        return missing
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if numbers < OLDEST:
        missing.append(f"TensorRT {found} is too old, expected {_version(OLDEST)} or newer; pip install '.[tensorrt]'")
    return missing


def _version(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
