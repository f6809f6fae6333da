"""Kernel tests in Triton's interpreter, which must be chosen before triton is imported: each file of cases in its own process.

The cases are in files that pytest does not collect by itself.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent


def check_interpreted(name: str) -> None:
    """Runs a file of cases, and fails if one of them fails."""
    pytest.importorskip("triton", reason="the kernels are written in Triton's language")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(_TESTS / name)]
    path = os.pathsep.join(filter(None, [str(_TESTS.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": path}
    done = subprocess.run(
        command, env=environment, cwd=_TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
