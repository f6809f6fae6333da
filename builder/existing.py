"""An engine that is there already: whether a build may replace it, and what of it can stay."""

import json
import os
import shutil
from filecmp import cmp
from pathlib import Path

from builder.errors import BuildError
from contract.manifest import COPIED_FILES, FILE_NAME, Manifest, ManifestError, read_manifest


def existing_engine(directory: Path) -> Manifest | None:
    """The manifest of the engine in `directory`; None where there is none with programs, or one of another format."""
    try:
        manifest = read_manifest(directory)
    except ManifestError:
        return None
    return manifest if manifest.programs else None


def check_replaceable(directory: Path, *, force: bool) -> None:
    """
    Raises:
        BuildError: `directory` holds what no engine has, or no manifest; or, without `force`, that of something else.
    """
    inside = sorted(directory.iterdir()) if directory.exists() else []
    folders = [each.name for each in inside if each.is_dir()]
    remedy = "expected an engine directory or a new one; choose another"
    if folders:
        raise BuildError(f"{directory}: holds the directory {folders[0]}, which no engine has; {remedy}")
    if inside and not (directory / FILE_NAME).exists():
        raise BuildError(f"{directory}: holds files but no {FILE_NAME}; {remedy}")
    if inside and not force and not _is_manifest(directory / FILE_NAME):
        raise BuildError(f"{directory}: {FILE_NAME} is none of an engine, or damaged; {remedy}, or give --force")


def _is_manifest(path: Path) -> bool:
    """Of any format."""
    try:
        return "format_version" in json.loads(path.read_text())
    except (ValueError, TypeError):
        return False


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
