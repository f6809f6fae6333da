"""Which paths a checkpoint and an engine may have."""

import os
from pathlib import Path

from builder.errors import BuildError
from contract.problems import printable


def check_path(path: Path) -> None:
    """
    Raises:
        BuildError: it is not UTF-8, and the reader of safetensors and a manifest take no other; or it has line breaks or other
            control characters, and errors quote paths.
    """
    real = os.path.realpath(path)
    try:
        real.encode()
    except UnicodeEncodeError:
        raise BuildError(f"{str(path)!r}: got a path that is not UTF-8, expected one that is; rename it") from None
    if printable(real) != real:
        raise BuildError(f"{real!r}: got a path with control characters, expected one without; rename it")
