"""The checkpoint's small files that an engine carries along: tokenizer, chat template and configurations."""

import os
from pathlib import Path

from tokenizers import Tokenizer

from builder.errors import BuildError
from contract.manifest import COPIED_FILES
from contract.regular_file import regular

_TOKENIZER = "tokenizer.json"


def carried_files(checkpoint: Path) -> dict[str, bytes]:
    """Name → content of those that the checkpoint has.

    Raises:
        BuildError: there is no tokenizer, or a file cannot be read.
    """
    if not (checkpoint / _TOKENIZER).exists():
        raise BuildError(f"{checkpoint}: missing {_TOKENIZER}; download the checkpoint again")
    return {name: _read(checkpoint / name) for name in COPIED_FILES if os.path.lexists(checkpoint / name)}


def check_tokenizer(checkpoint: Path, files: dict[str, bytes]) -> None:
    """
    Raises:
        BuildError: the tokenizer among the checkpoint's `files` cannot be opened.
    """
    try:
        Tokenizer.from_buffer(files[_TOKENIZER])
    except Exception as error:  # what `tokenizers` raises is a bare Exception
        raise BuildError(f"{checkpoint / _TOKENIZER}: damaged ({error}); download it again") from error


def are_current(engine: Path, files: dict[str, bytes]) -> bool:
    """Whether `engine` carries these and no others."""
    there = {name: _read(engine / name) for name in COPIED_FILES if (engine / name).exists()}
    return there == files


def _read(path: Path) -> bytes:
    try:
        return regular(path).read_bytes()
    except OSError as error:
        raise BuildError(f"{path}: cannot be read ({error}); give access to it, or replace it") from error
