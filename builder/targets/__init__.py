"""Targets: each module turns a traced program into one file of the engine directory.

| target | file | needs |
|---|---|---|
| `inductor` | `<program>.pt2` | a C++ compiler while building |
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from builder.errors import BuildError
from builder.export import TracedProgram
from builder.targets import inductor
from contract.manifest import Target

Compile = Callable[[TracedProgram, Path], str]
"""Writes the compiled program into a directory and returns the file's name."""

_COMPILERS: dict[Target, Compile] = {"inductor": inductor.compile_program}


def choose_target(wanted: Literal["auto", "tensorrt", "inductor"]) -> tuple[Target, str]:
    """The target to build and the reason, to be shown to the user.

    Raises:
        BuildError: a target was asked for that this version cannot build.
    """
    if wanted == "tensorrt":
        raise BuildError("target 'tensorrt': this version builds 'inductor' only; use --target inductor")
    if wanted != "auto":
        return wanted, "asked for"
    if importlib.util.find_spec("tensorrt") and torch.cuda.is_available():
        return "inductor", "TensorRT and a GPU are here, but this version builds 'inductor' for the CPU only"
    return "inductor", "runs on any CPU"


def compiler(target: Target) -> Compile:
    return _COMPILERS[target]
