"""Builds an engine directory from a checkpoint directory.

1. Read the configuration. 2. Check every tensor's name and shape. 3. Stop if the engine is up to date. 4. Trace each program
and 5. compile it. 6. Copy the tokenizer's files and write the manifest. 7. Put the finished directory in place, in one rename.
"""

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from builder.config import read_model_config
from builder.errors import BuildError
from builder.export import export_program, signatures
from builder.targets import choose_target, compiler
from builder.weights import VISION_PREFIXES, text_weights
from contract.checkpoint import Checkpoint
from contract.manifest import (
    COPIED_FILES,
    FILE_NAME,
    FORMAT_VERSION,
    BuildConfig,
    Manifest,
    ManifestError,
    Program,
    Weight,
    read_manifest,
)
from contract.manifest import Checkpoint as CheckpointRecord
from contract.model_config import ModelConfig
from plugins import PLUGIN_ABI

Report = Callable[[str], None]


def build_engine(
    checkpoint: Path,
    engine: Path,
    *,
    target: Literal["auto", "tensorrt", "inductor"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    force: bool = False,
    report: Report = lambda line: None,
    **choices: Any,
) -> Manifest:
    """Builds `engine` from `checkpoint` and returns its manifest; does nothing if the engine is up to date.

    `dtype` "auto" is the checkpoint's. `choices` are fields of `BuildConfig`. `report` is called with one line a stage.

    Raises:
        BuildError, CheckpointError: see their messages; `engine` is then as it was before.
    """
    # 1.
    chosen, reason = choose_target(target)
    model = read_model_config(checkpoint)
    build = BuildConfig(target=chosen, dtype=model.dtype if dtype == "auto" else dtype, **choices)
    if build.max_encode_tokens < model.canvas_length:
        raise BuildError(
            f"max_encode_tokens: got {build.max_encode_tokens}, expected at least one canvas, {model.canvas_length}"
        )
    report(f"target {chosen} ({reason}), dtype {build.dtype}{' (the checkpoint’s)' if dtype == 'auto' else ''}")
    # 2.
    tensors = Checkpoint(checkpoint)
    shapes = text_weights(model)
    tensors.check(shapes, ignored_prefixes=VISION_PREFIXES)
    missing = [name for name in ("tokenizer.json",) if not (checkpoint / name).exists()]
    if missing:
        raise BuildError(f"{checkpoint}: missing {', '.join(missing)}; download the checkpoint again")
    report(f"checkpoint {checkpoint}: {len(shapes)} text tensors, names and shapes as expected")

    manifest = describe(model, build, tensors, shapes, checkpoint, engine)
    # 3.
    if not force and _up_to_date(engine, manifest):
        report(f"engine {engine} is up to date; --force builds it again")
        return read_manifest(engine)
    with _staged(engine) as directory:
        # 4.
        programs = {}
        for signature in signatures(model, build):
            report(f"tracing {signature.name}")
            program = export_program(signature, model, build)
            # 5.
            report(f"compiling {program.name}")
            file = compiler(chosen)(program, directory)
            programs[program.name] = Program(file=file, inputs=program.inputs, weights=program.weights, outputs=program.outputs)
        # 6.
        for name in COPIED_FILES:
            if (checkpoint / name).exists():
                shutil.copyfile(checkpoint / name, directory / name)
        manifest = manifest.model_copy(update={"programs": programs})
        manifest.write(directory)
    report(f"engine {engine} written")
    return manifest


def describe(
    model: ModelConfig,
    build: BuildConfig,
    tensors: Checkpoint,
    shapes: dict[str, tuple[int, ...]],
    checkpoint: Path,
    engine: Path,
) -> Manifest:
    """Everything about the engine but its programs."""
    weights = {
        name: Weight(
            tensor=name,
            shape=shape,
            dtype=build.dtype,
            transform="none" if tensors.dtype(name) == build.dtype else "cast",
        )
        for name, shape in shapes.items()
    }
    path = os.path.relpath(checkpoint.resolve(), engine.resolve())
    return Manifest(
        format_version=FORMAT_VERSION,
        plugin_abi=PLUGIN_ABI,
        build=build,
        model=model,
        programs={},
        weights=weights,
        checkpoint=CheckpointRecord(path=path, files=tensors.fingerprint()),
        tools={"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()},
        source_digest=_source_digest(),
    )


def _source_digest() -> str:
    """A digest of the code that shapes an engine, so that a changed builder rebuilds."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(path for folder in ("builder", "contract", "plugins") for path in (root / folder).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _up_to_date(engine: Path, wanted: Manifest) -> bool:
    try:
        current = read_manifest(engine)
    except ManifestError:
        return False
    files_there = all((engine / program.file).exists() for program in current.programs.values())
    return files_there and current.model_copy(update={"programs": {}}) == wanted


@contextmanager
def _staged(engine: Path) -> Iterator[Path]:
    """A temporary directory beside `engine` that takes its place when the block succeeds, and vanishes when it fails."""
    engine.parent.mkdir(parents=True, exist_ok=True)
    if engine.exists() and any(engine.iterdir()) and not (engine / FILE_NAME).exists():
        raise BuildError(f"{engine}: holds files but no {FILE_NAME}; expected an engine directory or a new one; choose another")
    staging = Path(tempfile.mkdtemp(prefix=f".{engine.name}.", dir=engine.parent))
    try:
        staging.chmod(0o755)
        yield staging
        if engine.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{engine.name}.old.", dir=engine.parent))
            os.replace(engine, old / "engine")
            os.replace(staging, engine)
            shutil.rmtree(old)
        else:
            os.replace(staging, engine)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
