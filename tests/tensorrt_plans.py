"""Plans of a small model, made by the builder over `fake_tensorrt`, for the tests of builder and session."""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from fake_tensorrt import FakeTensorRT
from onnx_once import LIMITS, export_once, small_checkpoint, to_onnx_once

from builder.config import read_model_config
from builder.description import describe
from builder.export import TracedProgram, signatures
from builder.targets.compiled import Compiled
from builder.targets.tensorrt import PlanBuilder
from builder.weights import all_weights
from contract.checkpoint import Checkpoint
from contract.manifest import BuildConfig, Manifest, Program
from contract.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Plans:
    """plans: the directory that the plans are in."""

    fake: FakeTensorRT
    checkpoint: Path
    plans: Path
    model: ModelConfig
    build: BuildConfig
    programs: dict[str, TracedProgram]
    compiled: dict[str, Compiled]
    manifest: Manifest


@functools.cache
def small_plans() -> Plans:
    """Made once a process: tracing and exporting take seconds."""
    directory = Path(tempfile.mkdtemp(prefix="plans."))
    checkpoint = small_checkpoint(directory / "checkpoint")
    model = read_model_config(checkpoint)
    build = BuildConfig(target="tensorrt", dtype="float32", **LIMITS)
    fake = FakeTensorRT()
    builder = PlanBuilder(fake.trt, model, build, trtp=fake.trtp)
    programs = {each.name: export_once(each, model, build) for each in signatures(model, build)}
    with mock.patch("builder.targets.tensorrt.to_onnx", to_onnx_once):
        compiled = {name: builder.compile_program(program, directory) for name, program in programs.items()}
    manifest = describe(
        model,
        build.model_copy(update={"target": "inductor"}),
        Checkpoint(checkpoint),
        all_weights(model),
        checkpoint,
        directory,
    )
    records = {
        name: Program(
            file=compiled[name].file,
            inputs=program.inputs,
            weights=program.weights,
            outputs=program.outputs,
            profiles=compiled[name].profiles,
        )
        for name, program in programs.items()
    }
    tools = manifest.tools | {"tensorrt": fake.trt.__version__}
    manifest = manifest.model_copy(update={"build": build, "programs": records, "tools": tools})
    return Plans(
        fake=fake,
        checkpoint=checkpoint,
        plans=directory,
        model=model,
        build=build,
        programs=programs,
        compiled=compiled,
        manifest=manifest,
    )
