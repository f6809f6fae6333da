"""What is opened to be read is a file: who opens a FIFO waits for ever, and some devices have no end."""

import errno
import stat
from pathlib import Path

_OTHERS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def regular(path: Path) -> Path:
    """`path` itself, also of a directory, and where nothing can be found: who opens it is told of these.

    Raises OSError if it is neither that nor a file.
    """
    try:
        kind = _OTHERS.get(stat.S_IFMT(path.stat().st_mode))
    except OSError:
        return path
    if kind:
        raise OSError(errno.EINVAL, f"is {kind}, expected a file", str(path))
    return path
