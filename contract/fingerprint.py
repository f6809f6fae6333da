"""What a manifest knows of a checkpoint's file, so that another one in its place is told before it is used."""

import hashlib
from pathlib import Path

from contract.model_config import Record

_BLOCKS = 64
_BLOCK_BYTES = 4096


class FileFingerprint(Record):
    """Size in bytes and a digest of the file's header and of evenly spaced blocks: notices a changed or truncated file in
    milliseconds, whatever its size."""

    size_bytes: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> "FileFingerprint":
        """path: a safetensors file, which begins with its header's length in 8 bytes."""
        size = path.stat().st_size
        digest = hashlib.sha256()
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(header_bytes))
            stride = max(_BLOCK_BYTES, (size - header_bytes) // _BLOCKS)
            for offset in range(8 + header_bytes, size, stride):
                file.seek(offset)
                digest.update(file.read(_BLOCK_BYTES))
        return cls(size_bytes=size, digest=digest.hexdigest())
