"""Runs kernel tests in Triton's interpreter, which must be chosen before triton is imported: so in a process of their own.

The cases of a test are in a file that pytest does not collect by itself; the test calls `run_in_interpreter` with it. Without
triton it is skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_in_interpreter(cases: str) -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton's language")
    root = Path(cases).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", cases]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout + result.stderr


def let_dot_read_bfloat16() -> None:
    """The interpreter keeps bfloat16 as raw 16-bit words, and its matrix product takes those for numbers: converts them."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def numbers(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *precision):
        return plain(self, numbers(a), numbers(b), d, *precision)

    InterpreterBuilder.create_dot = create_dot
