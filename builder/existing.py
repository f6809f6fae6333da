"""An engine that is there already: whether a build may replace it, and what of it can stay."""

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from builder.errors import BuildError
from builder.export import WITHOUT_ONNX
from contract.manifest import COPIED_FILES, FILE_NAME, Checkpoint, Manifest, ManifestError, read_manifest
from contract.regular_file import regular

_COMPILED = re.compile(r"operators\.so|(encode|denoise|mixed|head|vision)(\.\d+)?\.(pt2|plan|onnx)")
"""Files that builds make, of every target and format of the manifest."""


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
        BuildError: `directory` holds what no engine has, or no manifest; or, without `force`, one that names no checkpoint.
    """
    inside = sorted(directory.iterdir()) if directory.exists() else []
    strange = next((each for each in inside if each.is_dir() or not _is_engine_file(each.name)), None)
    remedy = "expected an engine directory or a new one; choose another"
    if strange:
        kind = "directory" if strange.is_dir() else "file"
        raise BuildError(f"{directory}: holds the {kind} {strange.name}, which no engine has; {remedy}, or move it away")
    if inside and not (directory / FILE_NAME).exists():
        raise BuildError(f"{directory}: holds files but no {FILE_NAME}; {remedy}")
    if inside and not force and _checkpoint_of(directory) is None:
        raise BuildError(f"{directory}: {FILE_NAME} is none of an engine, or damaged; {remedy}, or give --force")


def _is_engine_file(name: str) -> bool:
    return name in (FILE_NAME, *COPIED_FILES) or _COMPILED.fullmatch(name) is not None


def check_same_checkpoint(engine: Path, wanted: Manifest) -> None:
    """Whatever format the manifest in `engine` has, and with programs or without: an older builder's engine is protected too.

    Raises:
        BuildError: it is of a checkpoint in another place and with other content.
    """
    was, now = _checkpoint_of(engine), wanted.checkpoint
    if was and was.path != now.path and was.files != now.files:
        was_path, now_path = (os.path.normpath(engine / each.path) for each in (was, now))
        raise BuildError(f"{engine}: was built from {was_path}, asked for {now_path}; choose another directory or give --force")


def _checkpoint_of(directory: Path) -> Checkpoint | None:
    """What the manifest in `directory` says that it was built from; None where none says so."""
    try:
        return Checkpoint.model_validate(json.loads(regular(directory / FILE_NAME).read_text())["checkpoint"])
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None


def damage(engine: Path, existing: Manifest) -> dict[str, str]:
    """Name → what is wrong, of files that are no longer as the build wrote them."""
    faults = {name: file.fault(engine / name) for name, file in existing.files.items()}
    return {name: fault for name, fault in faults.items() if fault}


def programs_can_stay(existing: Manifest, wanted: Manifest, sound: Collection[str], *, keep_onnx: bool) -> bool:
    """Whether a build of `wanted` would compile the same programs, and all their files are among the `sound` ones. A checkpoint
    that has moved changes none."""
    known = existing.checkpoint.files == wanted.checkpoint.files
    described = existing.model_copy(update={"programs": {}, "operators": None, "files": {}, "checkpoint": wanted.checkpoint})
    onnx = {f"{name}.onnx" for name in existing.programs if name not in WITHOUT_ONNX}
    needed = {*existing.program_files, *(onnx if keep_onnx else ())}
    return known and described == wanted and needed <= set(sound)


def copy_files(engine: Path, names: Collection[str], directory: Path) -> None:
    for name in names:
        shutil.copyfile(engine / name, directory / name)
