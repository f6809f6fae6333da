"""An engine that is there already: whether a build may replace it, and what of it can stay."""

import os
import shutil
from filecmp import cmp
from pathlib import Path

from builder.errors import BuildError
from contract.manifest import COPIED_FILES, Manifest, ManifestError, read_manifest


def existing_engine(directory: Path) -> Manifest | None:
    """The manifest of the engine in `directory`; None where there is none with programs, or one of another format."""
    try:
        manifest = read_manifest(directory)
    except ManifestError:
        return None
    return manifest if manifest.programs else None


def check_same_checkpoint(engine: Path, existing: Manifest, wanted: Manifest) -> None:
    """
    Raises:
        BuildError: `existing` was built from a checkpoint in another place and with other content.
    """
    was, now = existing.checkpoint, wanted.checkpoint
    if was.path != now.path and was.files != now.files:
        was_path, now_path = (os.path.normpath(engine / each.path) for each in (was, now))
        raise BuildError(f"{engine}: was built from {was_path}, asked for {now_path}; choose another directory or give --force")


def programs_can_stay(engine: Path, existing: Manifest, wanted: Manifest, *, keep_onnx: bool) -> bool:
    """Whether a build of `wanted` would compile the same programs, and all their files are there. A checkpoint that has moved
    changes none."""
    known = existing.checkpoint.files == wanted.checkpoint.files
    described = existing.model_copy(update={"programs": {}, "operators": None, "checkpoint": wanted.checkpoint})
    return known and described == wanted and all((engine / file).is_file() for file in _files(existing, keep_onnx))


def copy_programs(engine: Path, existing: Manifest, directory: Path, *, keep_onnx: bool) -> None:
    for file in _files(existing, keep_onnx):
        shutil.copyfile(engine / file, directory / file)


def copies_are_current(engine: Path, checkpoint: Path) -> bool:
    """Whether the files that an engine carries along are those of the checkpoint."""
    return all(_same(checkpoint / name, engine / name) for name in COPIED_FILES)


def _files(existing: Manifest, keep_onnx: bool) -> list[str]:
    files = [file for program in existing.programs.values() for file in (program.file, *(v.file for v in program.variants))]
    files += [f"{name}.onnx" for name in existing.programs if keep_onnx]
    return files + ([existing.operators] if existing.operators else [])


def _same(left: Path, right: Path) -> bool:
    if left.is_file() and right.is_file():
        return cmp(left, right, shallow=False)
    return left.exists() == right.exists()
