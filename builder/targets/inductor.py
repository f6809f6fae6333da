"""The `inductor` target: one AOTInductor package a program."""

import warnings
from pathlib import Path

import torch

from builder.export import TracedProgram


def compile_program(program: TracedProgram, directory: Path) -> str:
    """Compiles to `<name>.pt2`. Plugin operators stay calls through the dispatcher; all else becomes C++."""
    name = f"{program.name}.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own, about its pickled tree specs
        torch._inductor.aoti_compile_and_package(program.exported, package_path=str(directory / name))
    return name
