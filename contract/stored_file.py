"""What a manifest knows of a file that a build has written, so that a damaged one is told before it is used."""

import hashlib
from pathlib import Path

from contract.model_config import Record
from contract.regular_file import regular


class StoredFile(Record):
    """A file's size and SHA-256.

    Files are read whole, plans of TensorRT too: programs hold no weights and are of some MB, which takes milliseconds.
    """

    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "StoredFile":
        content = regular(path).read_bytes()
        return cls(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def fault(self, path: Path) -> str | None:
        """What is wrong with the file at `path`; None if it is this one."""
        try:
            found = StoredFile.of(path)
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            return f"cannot be read ({error})"
        if found.size_bytes != self.size_bytes:
            return f"got {found.size_bytes} bytes, expected {self.size_bytes}"
        if found.sha256 != self.sha256:
            return f"got the SHA-256 {found.sha256[:12]}…, expected {self.sha256[:12]}…"
        return None
