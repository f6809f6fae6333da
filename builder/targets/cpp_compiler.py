"""The C++ compiler that AOTInductor uses: whether it can be used here, and what it says where it fails."""

import re
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._inductor import config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

from builder.errors import BuildError

_TELLING = re.compile(r"error:|no space left|cannot find|undefined reference", re.IGNORECASE)
_NOT_QUOTED = re.compile(r"[\s'\"\\]")


def cpp_compiler() -> str:
    """
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


def check_directories() -> None:
    """
    Raises:
        BuildError: there is no temporary directory, or AOTInductor cannot use it, or that of PyTorch or of Python's libraries.
    """
    try:
        temporary = tempfile.gettempdir()
    except OSError as error:
        raise BuildError(f"temporary directory: {error}; make room, or name one in TMPDIR") from error
    _check_stays_whole("temporary directory", temporary, "name another in TMPDIR")
    _check_stays_whole("PyTorch's directory", str(Path(torch.__file__).parent), "install it in another")
    _check_stays_whole("directory of Python's libraries", str(sysconfig.get_config_var("LIBDIR")), "use another Python")


def _check_stays_whole(what: str, directory: str, remedy: str) -> None:
    if _NOT_QUOTED.search(directory):  # it is put into command lines as it is, and these are split
        raise BuildError(
            f"{what}: got {directory!r}, expected a path without spaces, quotes and backslashes, which PyTorch does not quote; "
            f"{remedy}"
        )


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Around a call of AOTInductor. Raises BuildError, in one line, for whatever it raises."""
    try:
        yield
    except Exception as error:  # compilers, their caches, the system: it lets all of it through
        cause = getattr(error, "inner_exception", error)
        said = cause.output if isinstance(cause, CppCompileError) else f"{type(cause).__name__}: {cause}"
        raise not_compiled(what, said) from error


def not_compiled(what: str, said: str) -> BuildError:
    """said: all that the compiler wrote."""
    return BuildError(
        f"{what}: cannot be compiled ({_telling_line(said)}); expected GCC 12 or newer (CXX names another), room for it, "
        f"and room in {tempfile.gettempdir()} (TMPDIR names another)"
    )


def _telling_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["without a word"]
    return next((line for line in lines if _TELLING.search(line)), lines[0])
