"""Compiles the plugins' C++ operators for the CPU that is here, with the compiler that AOTInductor uses."""

import subprocess
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

from builder.targets.cpp_compiler import cpp_compiler, not_compiled
from plugins.cpu import SOURCES

FILE_NAME = "operators.so"
# Contraction: a product and a sum become one instruction. The other two let loops with square roots and comparisons be vectors.
_FLAGS = "-std=c++20 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC".split()


def compile_operators(directory: Path, sources: tuple[Path, ...] = SOURCES) -> str:
    """Compiles `sources` to `operators.so` and returns that name.

    Raises:
        BuildError: there is no compiler, or it refuses.
    """
    command = [
        cpp_compiler(),
        *map(str, sources),
        *_FLAGS,
        f"-I{Path(__file__).parent.parent.parent}",
        *(f"-isystem{path}" for path in include_paths()),
        *(f"-L{path}" for path in library_paths()),
        "-ltorch_cpu",
        "-o",
        str(directory / FILE_NAME),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise not_compiled(str(directory / FILE_NAME), done.stderr)
    return FILE_NAME
