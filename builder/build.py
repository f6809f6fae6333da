"""Builds an engine directory from a checkpoint directory.

1. Read the configuration. 2. Check every tensor's name and shape. 3. Stop if the engine is up to date. 4. Trace each program
and 5. compile it. 6. Copy the tokenizer's files and write the manifest. 7. Put the finished directory in place, in one rename.
"""

import hashlib
import multiprocessing
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from rich.console import Console

from builder.config import read_model_config
from builder.errors import BuildError
from builder.export import Signature, TracedProgram, export_program, minimums, signatures
from builder.onnx_export import to_onnx
from builder.targets import choose_device, choose_target, compiler, current_gpu, versions
from builder.weights import VISION_PREFIXES, text_weights
from contract.checkpoint import Checkpoint
from contract.cpu import this_cpu
from contract.manifest import (
    COPIED_FILES,
    FILE_NAME,
    FORMAT_VERSION,
    BuildConfig,
    Manifest,
    ManifestError,
    Program,
    Variant,
    Weight,
    read_manifest,
)
from contract.manifest import Checkpoint as CheckpointRecord
from contract.model_config import ModelConfig
from plugins import PLUGIN_ABI

Report = Callable[[str], None]

TIMING_CACHE = "tensorrt.timing_cache"
"""File beside the engine directories: what TensorRT measured, so that a second build need not measure it again."""


def build_engine(
    checkpoint: Path,
    engine: Path,
    *,
    target: Literal["auto", "tensorrt", "inductor"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    keep_onnx: bool = False,
    timing_cache: Path | None = None,
    force: bool = False,
    console: Console | None = None,
    report: Report = lambda line: None,
    **choices: Any,
) -> Manifest:
    """Builds `engine` from `checkpoint` and returns its manifest; does nothing if the engine is up to date.

    `dtype` "auto" is the checkpoint's; `device` "auto" is the GPU where there is one. `keep_onnx` also writes each program as
    `<program>.onnx`, for other tools. `timing_cache` is TensorRT's, a file; None is one beside the engine. `choices` are fields
    of `BuildConfig`. `report` is called with one line a stage; a stage that takes long may show its progress on `console`.

    Raises:
        BuildError, CheckpointError: see their messages; `engine` is then as it was before.
    """
    # 1.
    chosen_device, device_reason = choose_device(device)
    chosen, reason = choose_target(target, chosen_device)
    model = read_model_config(checkpoint)
    build = BuildConfig(target=chosen, dtype=model.dtype if dtype == "auto" else dtype, device=chosen_device, **choices)
    if build.max_encode_tokens < model.canvas_length:
        raise BuildError(
            f"max_encode_tokens: got {build.max_encode_tokens}, expected at least one canvas, {model.canvas_length}"
        )
    report(f"target {chosen} ({reason}), device {chosen_device} ({device_reason})")
    report(f"dtype {build.dtype} ({'the checkpoint’s' if dtype == 'auto' else 'asked for'})")
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
    if not force and _up_to_date(engine, manifest, keep_onnx):
        report(f"engine {engine} is up to date; --force builds it again")
        return read_manifest(engine)
    with _staged(engine) as directory:
        # 4. and 5.
        if chosen == "tensorrt":
            cache = timing_cache or engine.parent / TIMING_CACHE
            programs = compile_plans(model, build, directory, report, timing_cache=cache, console=console)
        else:
            programs = compile_programs(model, build, directory, report)
        if keep_onnx:
            write_onnx(model, build, directory, report)
        # 6.
        for name in COPIED_FILES:
            if (checkpoint / name).exists():
                shutil.copyfile(checkpoint / name, directory / name)
        manifest = manifest.model_copy(update={"programs": programs})
        manifest.write(directory)
    report(f"engine {engine} written")
    return manifest


def compile_programs(model: ModelConfig, build: BuildConfig, directory: Path, report: Report) -> dict[str, Program]:
    """Traces and compiles every program with its variants into `directory`: for a GPU all at once, each in its own process."""
    wanted = {each.name: minimums(each, model, build) for each in signatures(model, build)}
    tasks = [(model, build, name, minimum, directory) for name, least in wanted.items() for minimum in least]
    done: dict[tuple[str, int], Program] = {}
    at_once = min(len(tasks), os.cpu_count() or 1) if build.device == "cuda" else 1
    report("compiling " + ", ".join(f"{name} ({len(least)} times)" for name, least in wanted.items()))
    if at_once == 1:
        done = {(task[2], task[3]): _compile(*task) for task in tasks}
    else:
        with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
            running = {pool.submit(_compile, *task): (task[2], task[3]) for task in tasks}
            for future in as_completed(running):
                done[running[future]] = future.result()
                report(f"compiled {future.result().file}")
    return {
        name: done[name, 1].model_copy(
            update={"variants": tuple(Variant(minimum=each, file=done[name, each].file) for each in least[1:])}
        )
        for name, least in wanted.items()
    }


def _compile(model: ModelConfig, build: BuildConfig, name: str, minimum: int, directory: Path) -> Program:
    [signature] = [each for each in signatures(model, build) if each.name == name]
    program = export_program(signature, model, build, minimum)  # 4.
    compiled = compiler(build, model)(program, directory)  # 5.
    return Program(file=compiled.file, inputs=program.inputs, weights=program.weights, outputs=program.outputs)


def compile_plans(
    model: ModelConfig, build: BuildConfig, directory: Path, report: Report, *, timing_cache: Path, console: Console | None
) -> dict[str, Program]:
    """Traces and compiles every program for TensorRT, one after the other: each takes the whole GPU, to time it."""
    compile_program = compiler(build, model, timing_cache=timing_cache, console=console)
    programs = {}
    for signature in signatures(model, build):
        report(f"tracing {signature.name}")
        program = _traced_for_onnx(signature, model, build)  # 4.
        report(f"compiling {program.name}")
        compiled = compile_program(program, directory)  # 5.
        programs[program.name] = Program(
            file=compiled.file,
            inputs=program.inputs,
            weights=program.weights,
            outputs=program.outputs,
            profiles=compiled.profiles,
        )
    return programs


def write_onnx(model: ModelConfig, build: BuildConfig, directory: Path, report: Report) -> None:
    """Writes every program as `<program>.onnx`."""
    for signature in signatures(model, build):
        report(f"writing {signature.name}.onnx")
        onnx.save(to_onnx(_traced_for_onnx(signature, model, build)), directory / f"{signature.name}.onnx")


def _traced_for_onnx(signature: Signature, model: ModelConfig, build: BuildConfig) -> TracedProgram:
    """ONNX knows no device: the program is traced where tests trace it."""
    return export_program(signature, model, build.model_copy(update={"device": "cpu"}))


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
        gpu=current_gpu() if build.device == "cuda" else None,
        model=model,
        programs={},
        weights=weights,
        checkpoint=CheckpointRecord(path=path, files=tensors.fingerprint()),
        tools={"python": platform.python_version(), "torch": torch.__version__, "cpu": this_cpu()} | versions(build.target),
        source_digest=_source_digest(),
    )


def _source_digest() -> str:
    """A digest of the code that shapes an engine, so that a changed builder rebuilds."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(path for folder in ("builder", "contract", "plugins") for path in (root / folder).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _up_to_date(engine: Path, wanted: Manifest, keep_onnx: bool) -> bool:
    try:
        current = read_manifest(engine)
    except ManifestError:
        return False
    files = [file for program in current.programs.values() for file in (program.file, *(v.file for v in program.variants))]
    files += [f"{name}.onnx" for name in current.programs if keep_onnx]
    return all((engine / file).exists() for file in files) and current.model_copy(update={"programs": {}}) == wanted


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
