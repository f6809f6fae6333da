"""Builds an engine directory from a checkpoint directory.

1. Read the configuration. 2. Check every tensor's name, shape and dtype. 3. See what of an engine that is there can stay, and
stop if all can. 4. Trace each program and 5. compile it. 6. Copy the tokenizer's files and write the manifest. 7. Put the
finished directory in place, in one rename.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import onnx
from rich.console import Console

from builder.compiling import compile_programs
from builder.config import read_model_config
from builder.description import ConfigAlone, checked, describe
from builder.errors import BuildError
from builder.existing import check_same_checkpoint, copies_are_current, copy_programs, existing_engine, programs_can_stay
from builder.export import Signature, TracedProgram, export_program, signatures
from builder.onnx_export import to_onnx
from builder.staging import real_place, staged
from builder.targets import choose_device, choose_expert_weights, choose_target, compiler
from builder.targets.cpu_operators import compile_operators, cpp_compiler
from builder.targets.inductor import has_compiled_operators
from builder.weights import all_weights, vision_weights
from contract.checkpoint import Checkpoint
from contract.manifest import (
    COPIED_FILES,
    FILE_NAME,
    BuildConfig,
    Manifest,
    Program,
    read_manifest,
)
from contract.model_config import ModelConfig

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
    expert_weights: Literal["auto", "plain", "packed"] = "auto",
    keep_onnx: bool = False,
    timing_cache: Path | None = None,
    force: bool = False,
    console: Console | None = None,
    report: Report = lambda line: None,
    **choices: Any,
) -> Manifest:
    """Builds `engine` from `checkpoint` and returns its manifest; does nothing if the engine is up to date.

    An engine that was built from another checkpoint is replaced only with `force`; if `engine` is a link, what it points to
    is. `dtype` "auto" is the checkpoint's; `device` "auto" is the GPU where there is one; `expert_weights` "auto" are packed
    where a GPU's kernels take packed ones. `keep_onnx` also writes each program as `<program>.onnx`, for other tools.
    `timing_cache` is TensorRT's, a file; None is one beside the engine. `choices` are fields of `BuildConfig`. `report` is
    called with one line a stage; a stage that takes long may show its progress on `console`.

    Raises:
        BuildError, CheckpointError: see their messages; `engine` is then as it was before.
    """
    place = real_place(engine)
    # 1.
    chosen_device, device_reason = choose_device(device)
    model = read_model_config(checkpoint)
    only_inductor = _only_inductor(model, target, keep_onnx)
    chosen, reason = choose_target("inductor" if only_inductor else target, chosen_device)
    in_dtype = model.dtype if dtype == "auto" else dtype
    chosen_weights, weights_reason = choose_expert_weights(
        expert_weights, model, target=chosen, dtype=in_dtype, device=chosen_device, keep_onnx=keep_onnx
    )
    build = BuildConfig(target=chosen, dtype=in_dtype, device=chosen_device, expert_weights=chosen_weights, **choices)
    _check_encodes_a_canvas(build, model)
    if timing_cache and chosen != "tensorrt":
        raise BuildError(f"timing_cache: got {timing_cache}, expected none: the target is {chosen}, TensorRT alone has timings")
    if build.expert_activations != "full" and model.experts_dtype is None:
        raise BuildError(
            f"expert_activations: got {build.expert_activations!r}, expected 'full': {checkpoint} has no FP8 experts; "
            "write a checkpoint that has with: python -m builder quantize CHECKPOINT OUTPUT"
        )
    if only_inductor and target == "auto":
        reason = "the experts' weights are FP8"
    report(f"target {chosen} ({reason}), device {chosen_device} ({device_reason})")
    report(f"dtype {build.dtype} ({'the checkpoint’s' if dtype == 'auto' else 'asked for'})")
    if model.experts_dtype:
        report(f"experts {model.experts_dtype}, expert activations {build.expert_activations}")
    report(f"expert weights {build.expert_weights} ({weights_reason})")
    # 2.
    tensors = Checkpoint(checkpoint)
    model, shapes = checked(tensors, model)
    missing = [name for name in ("tokenizer.json",) if not (checkpoint / name).exists()]
    if missing:
        raise BuildError(f"{checkpoint}: missing {', '.join(missing)}; download the checkpoint again")
    num_vision = len(vision_weights(model))
    images = f"{num_vision} vision tensors" if num_vision else "no vision tower, reads text alone"
    report(f"checkpoint {checkpoint}: {len(shapes) - num_vision} text tensors, {images}; names and shapes as expected")

    manifest = describe(model, build, tensors, shapes, checkpoint, place)
    # 3.
    existing = None if force else existing_engine(place)
    if existing:
        check_same_checkpoint(place, existing, manifest)
        if not programs_can_stay(place, existing, manifest, keep_onnx=keep_onnx):
            existing = None
        elif existing.checkpoint == manifest.checkpoint and copies_are_current(place, checkpoint):
            report(f"engine {engine} is up to date; --force builds it again")
            return existing
    if chosen == "inductor" and not existing:
        cpp_compiler()  # or tracing would be for nothing
    with staged(place, force=force) as directory:
        # 4. and 5.
        if existing:
            report("the programs are up to date, files of the checkpoint are not: copying them")
            copy_programs(place, existing, directory, keep_onnx=keep_onnx)
            programs, operators = existing.programs, existing.operators
        else:
            if chosen == "tensorrt":
                cache = timing_cache or place.parent / TIMING_CACHE
                programs = compile_plans(model, build, directory, report, timing_cache=cache, console=console)
            else:
                programs = compile_programs(model, build, directory, report)
            if keep_onnx:
                write_onnx(model, build, directory, report)
            operators = None
            if has_compiled_operators(build):
                report("compiling the CPU operators")
                operators = compile_operators(directory)
        # 6.
        for name in COPIED_FILES:
            if (checkpoint / name).exists():
                shutil.copyfile(checkpoint / name, directory / name)
        manifest = manifest.model_copy(update={"programs": programs, "operators": operators})
        manifest.write(directory)
    report(f"engine {engine} written")
    return manifest


def _check_encodes_a_canvas(build: BuildConfig, model: ModelConfig) -> None:
    """
    Raises:
        BuildError: an encode pass could not take one canvas.
    """
    if build.max_encode_tokens < model.canvas_length:
        raise BuildError(
            f"max_encode_tokens: got {build.max_encode_tokens}, expected at least one canvas, {model.canvas_length}"
        )


def _only_inductor(model: ModelConfig, target: str, keep_onnx: bool) -> bool:
    """Whether the checkpoint leaves no choice of target.

    Raises:
        BuildError: another was asked for.
    """
    if model.experts_dtype is None:
        return False
    if target == "tensorrt" or keep_onnx:
        asked = "target 'tensorrt'" if target == "tensorrt" else "--keep-onnx"
        raise BuildError(f"{asked}: the experts' weights are FP8, which only the inductor target takes; use --target inductor")
    return True


def write_manifest(
    checkpoint: Path,
    engine: Path,
    *,
    expert_weights: Literal["auto", "plain", "packed"] = "auto",
    report: Report = lambda line: None,
    **choices: Any,
) -> Manifest:
    """Writes the manifest that an engine for the CPU would have, without its programs: to plan with, in seconds.

    Of `checkpoint` config.json is enough; tensors that are there are checked. `choices` are fields of `BuildConfig`.

    Raises:
        BuildError, CheckpointError: see their messages; an engine that has programs is not replaced.
    """
    place = real_place(engine)
    if (place / FILE_NAME).exists() and read_manifest(place).programs:
        raise BuildError(f"{engine}: is an engine with programs, and has its manifest; choose another directory")
    model = read_model_config(checkpoint)
    shapes = all_weights(model)
    tensors: Checkpoint | ConfigAlone = ConfigAlone(model)
    if any(checkpoint.glob("*.safetensors*")):
        tensors = Checkpoint(checkpoint)
        model, shapes = checked(tensors, model)
    chosen, _ = choose_expert_weights(
        expert_weights, model, target="inductor", dtype=model.dtype, device="cpu", keep_onnx=False
    )
    build = BuildConfig(target="inductor", dtype=model.dtype, expert_weights=chosen, **choices)
    _check_encodes_a_canvas(build, model)
    manifest = describe(model, build, tensors, shapes, checkpoint, place)
    with staged(place) as directory:
        manifest.write(directory)
    source = "their files" if isinstance(tensors, Checkpoint) else "config.json alone"
    report(f"manifest of {len(shapes)} tensors, from {source}, written to {engine}; it has no programs")
    return manifest


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
