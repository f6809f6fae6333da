"""Compiles the plugins' C++ operators for the CPU that is here, with the compiler that AOTInductor uses."""

import subprocess
from pathlib import Path

from torch._inductor import config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils.cpp_extension import include_paths, library_paths

from builder.errors import BuildError
from plugins.cpu import SOURCES

FILE_NAME = "operators.so"
# Contraction: a product and a sum become one instruction. The other two let loops with square roots and comparisons be vectors.
_FLAGS = "-std=c++20 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC".split()
_SHOWN_LINES = 20


def cpp_compiler() -> str:
    """The C++ compiler that AOTInductor uses.

    Raises:
        BuildError: there is none.
    """
    try:
        return get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        cxx = config.cpp.cxx
        name = cxx[-1] if isinstance(cxx, (list, tuple)) else cxx
        raise BuildError(
            f"C++ compiler: {name} does not run, expected GCC 12 or newer; install it (apt-get install g++), or name one in CXX"
        ) from None


def compile_operators(directory: Path, sources: tuple[Path, ...] = SOURCES) -> str:
    """Compiles `sources` to `operators.so` and returns that name.

    Raises:
        BuildError: there is no compiler, or it refuses, with its first lines.
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
        first_lines = "\n".join(done.stderr.splitlines()[:_SHOWN_LINES])
        raise BuildError(
            f"{command[0]} cannot compile the CPU operators, expected GCC 12 or newer (CXX names another):\n{first_lines}"
        )
    return FILE_NAME
