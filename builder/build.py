"""Builds an engine directory from a checkpoint directory.

1. Read the configuration. 2. Check every tensor's name, shape and dtype. 3. See what of an engine that is there can stay, and
stop if all can. 4. Check what compiling needs, and copy the checkpoint's small files: what is wrong with these is told before
anything long. 5. Compile the CPU operators, which needs a new compiler, then trace and compile each program. 6. Write the
manifest, with a record of every file. 7. Put the finished directory in place.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from builder.batch_invariance import check_batch_invariant
from builder.carried_files import are_current, carried_files, check_tokenizer
from builder.compiling import compile_plans, compile_programs
from builder.config import read_model_config
from builder.description import ConfigAlone, checked, describe
from builder.errors import BuildError
from builder.existing import check_same_checkpoint, copy_files, damage, existing_engine, programs_can_stay
from builder.expert_gpus import check_expert_gpus, check_parts
from builder.onnx_export import write_onnx
from builder.quantization import CALLED, FP8
from builder.staging import real_place, staged, writing
from builder.targets import choose_device, choose_expert_weights, choose_target
from builder.targets.cpp_compiler import check_directories, cpp_compiler
from builder.targets.cpu_operators import compile_operators
from builder.targets.gpu_kernels import check_kernels
from builder.targets.inductor import has_compiled_operators
from builder.weights import all_weights, vision_weights
from contract.checkpoint import Checkpoint
from contract.manifest import FILE_NAME, BuildConfig, Manifest, read_manifest
from contract.model_config import ModelConfig
from contract.stored_file import StoredFile

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
    expert_weights: Literal["auto", "plain", "packed", "int4"] = "auto",
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
    where a GPU's kernels take packed ones, and never in 4 bits. `keep_onnx` also writes each program as `<program>.onnx`, for
    other tools; those of an earlier build stay as long as the programs do, but for damaged ones.
    `timing_cache` is TensorRT's, a file; None is one beside the engine. `choices` are fields of `BuildConfig`. `report` is
    called with one line a stage; a stage that takes long may show its progress on `console`.

    Raises:
        BuildError, CheckpointError: see their messages; `engine` is then as it was before.
    """
    place = real_place(engine)
    # 1.
    chosen_device, device_reason = choose_device(device)
    model = read_model_config(checkpoint)
    only_inductor = _only_inductor(model, expert_weights, target, keep_onnx, choices.get("expert_gpus", 1))
    chosen, reason = choose_target("inductor" if only_inductor else target, chosen_device)
    in_dtype = model.dtype if dtype == "auto" else dtype
    chosen_weights, weights_reason = choose_expert_weights(
        expert_weights, model, target=chosen, dtype=in_dtype, device=chosen_device, keep_onnx=keep_onnx
    )
    build = BuildConfig(target=chosen, dtype=in_dtype, device=chosen_device, expert_weights=chosen_weights, **choices)
    _check_encodes_a_canvas(build, model)
    if build.batch_invariant:
        check_batch_invariant(build, model)
    if build.expert_gpus > 1:
        check_expert_gpus(build, model)
    if timing_cache and chosen != "tensorrt":
        raise BuildError(f"timing_cache: got {timing_cache}, expected none: the target is {chosen}, TensorRT alone has timings")
    if build.expert_activations != "full" and model.experts_dtype != FP8:
        raise BuildError(
            f"expert_activations: got {build.expert_activations!r}, expected 'full': {checkpoint} has no FP8 experts; "
            "write a checkpoint that has with: python -m builder quantize CHECKPOINT OUTPUT"
        )
    report(f"target {chosen} ({only_inductor or reason}), device {chosen_device} ({device_reason})")
    report(f"dtype {build.dtype} ({'the checkpoint’s' if dtype == 'auto' else 'asked for'})")
    if model.experts_dtype:
        report(f"experts {model.experts_dtype}, expert activations {build.expert_activations}")
    report(f"expert weights {build.expert_weights} ({weights_reason})")
    if build.expert_gpus > 1:
        report(f"experts shared by {build.expert_gpus} GPUs, {model.num_experts // build.expert_gpus} of each layer on each")
    # 2.
    tensors = Checkpoint(checkpoint)
    model, shapes = checked(tensors, model)
    carried = carried_files(checkpoint)
    num_vision = len(vision_weights(model))
    images = f"{num_vision} vision tensors" if num_vision else "no vision tower, reads text alone"
    report(f"checkpoint {checkpoint}: {len(shapes) - num_vision} text tensors, {images}; names and shapes as expected")

    manifest = describe(model, build, tensors, shapes, checkpoint, place)
    # 3.
    existing, damaged, kept = None, {}, {}
    if not force:
        check_same_checkpoint(place, manifest)
        existing = existing_engine(place)
    if existing:
        damaged = damage(place, existing)
        for name, fault in damaged.items():
            report(f"{place / name}: {fault}")
        kept = {name: file for name, file in existing.files.items() if name not in damaged}
        if not programs_can_stay(existing, manifest, kept, keep_onnx=keep_onnx):
            existing, kept = None, {}
        elif not damaged and existing.checkpoint == manifest.checkpoint and are_current(place, carried):
            report(f"engine {engine} is up to date; --force builds it again")
            return existing
    # 4.
    check_tokenizer(checkpoint, carried)
    if not existing and build.device == "cuda":
        check_kernels(model, build)
    if not existing and chosen == "inductor":
        cpp_compiler()
        check_directories()
    if not existing and timing_cache and not os.access(timing_cache.parent, os.W_OK):
        raise BuildError(f"timing_cache: got {timing_cache}, expected a file in a directory that can be written; name another")
    onnx = {path.name for path in place.glob("*.onnx")} | {name for name in damaged if name.endswith(".onnx")}
    if not keep_onnx and (lost := sorted(onnx - kept.keys())):
        report(f"{', '.join(lost)} will not be in {engine}; --keep-onnx writes them again")
    with staged(place, force=force) as directory:
        with writing(place):
            for name, content in carried.items():
                (directory / name).write_bytes(content)
        if existing:
            report("the programs are up to date, other files are not: copying the programs and the checkpoint's files")
            with writing(place):
                copy_files(place, kept, directory)
            made = {"programs": existing.programs, "operators": existing.operators, "files": kept}
        else:
            # 5.
            operators = None
            if has_compiled_operators(build):
                report("compiling the CPU operators")
                operators = compile_operators(directory)
            if chosen == "tensorrt":
                cache = timing_cache or place.parent / TIMING_CACHE
                programs = compile_plans(model, build, directory, report, timing_cache=cache, console=console)
            else:
                programs = compile_programs(model, build, directory, report)
            if keep_onnx:
                write_onnx(model, build, directory, report)
            files = {path.name: StoredFile.of(path) for path in sorted(directory.iterdir()) if path.name not in carried}
            made = {"programs": programs, "operators": operators, "files": files}
        # 6.
        manifest = manifest.model_copy(update=made)
        with writing(place):
            manifest.write(directory)
        if not force:  # another build may have written it meanwhile
            check_same_checkpoint(place, manifest)
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


def _only_inductor(model: ModelConfig, expert_weights: str, target: str, keep_onnx: bool, expert_gpus: int) -> str:
    """Why the experts leave target "auto" no choice; nothing, if they do, or another is asked for.

    Raises:
        BuildError: the checkpoint's experts leave none, and another was asked for.
    """
    if model.experts_dtype and (target == "tensorrt" or keep_onnx):
        asked = "target 'tensorrt'" if target == "tensorrt" else "--keep-onnx"
        raise BuildError(
            f"{asked}: the experts' weights are {CALLED[model.experts_dtype]}, which only the inductor target takes; "
            "use --target inductor"
        )
    if expert_gpus > 1 and keep_onnx:
        raise BuildError(f"--keep-onnx: got {expert_gpus} GPUs that share the experts, expected one; leave out --expert-gpus")
    if expert_gpus > 1 and target == "auto":
        return "GPUs share the experts"
    stored = CALLED.get(model.experts_dtype, expert_weights)
    return f"the experts' weights are {stored}" if target == "auto" and stored not in ("auto", "plain") else ""


def write_manifest(
    checkpoint: Path,
    engine: Path,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    expert_weights: Literal["auto", "plain", "packed", "int4"] = "auto",
    report: Report = lambda line: None,
    **choices: Any,
) -> Manifest:
    """Writes the manifest that an engine for the CPU would have, without its programs: to plan with, in seconds.

    Of `checkpoint` config.json is enough; tensors that are there are checked. `dtype` "auto" is the checkpoint's. `choices` are
    fields of `BuildConfig`.

    Raises:
        BuildError, CheckpointError: see their messages; an engine that has programs is not replaced.
    """
    place = real_place(engine)
    if (place / FILE_NAME).exists() and read_manifest(place).programs:
        raise BuildError(f"{engine}: is an engine with programs, and has its manifest; choose another directory")
    model = read_model_config(checkpoint)
    shapes = all_weights(model)
    tensors: Checkpoint | ConfigAlone = ConfigAlone(model)
    if any(checkpoint.glob("*.safetensors")):  # an index may have come with config.json
        tensors = Checkpoint(checkpoint)
        model, shapes = checked(tensors, model)
    in_dtype = model.dtype if dtype == "auto" else dtype
    chosen, _ = choose_expert_weights(expert_weights, model, target="inductor", dtype=in_dtype, device="cpu", keep_onnx=False)
    build = BuildConfig(target="inductor", dtype=in_dtype, expert_weights=chosen, **choices)
    _check_encodes_a_canvas(build, model)
    check_parts(build, model)
    manifest = describe(model, build, tensors, shapes, checkpoint, place)
    with staged(place) as directory, writing(place):
        manifest.write(directory)
    source = "their files" if isinstance(tensors, Checkpoint) else "config.json alone"
    report(f"manifest of {len(shapes)} tensors, from {source}, written to {engine}; it has no programs")
    return manifest
