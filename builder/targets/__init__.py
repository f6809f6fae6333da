"""Targets: each module turns a traced program into one file of the engine directory.

| target | file | needs |
|---|---|---|
| `inductor` | `<program>.pt2` | a C++ compiler while building; for a GPU, that GPU and CUDA's headers too |
| `tensorrt` | `<program>.plan` | TensorRT and the GPU that the plan is for, H100 or H200 |
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from builder.errors import BuildError
from builder.export import TracedProgram
from builder.targets import inductor
from builder.targets.compiled import Compiled
from builder.targets.tensorrt_needs import missing_for_tensorrt
from contract.manifest import BuildConfig, Device, ExpertWeights, Gpu, Target
from contract.model_config import ModelConfig

Compile = Callable[[TracedProgram, Path], Compiled]
"""Writes the compiled program into a directory and says what it wrote."""


def choose_target(wanted: Literal["auto", "tensorrt", "inductor"], device: Device) -> tuple[Target, str]:
    """The target to build for `device` and the reason, to be shown to the user.

    Raises:
        BuildError: TensorRT was asked for and something that it needs is missing.
    """
    if wanted == "inductor":
        return wanted, "asked for"
    missing = missing_for_tensorrt(device)
    if not missing:
        return "tensorrt", "asked for" if wanted == "tensorrt" else "TensorRT and a GPU that it builds for are here"
    if wanted == "tensorrt":
        raise BuildError(f"target 'tensorrt': {'; '.join(missing)}")
    return "inductor", f"no tensorrt: {missing[0].partition(';')[0]}"


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> tuple[Device, str]:
    """The device to build for and the reason, to be shown to the user.

    Raises:
        BuildError: a GPU was asked for and there is none.
    """
    if torch.cuda.is_available():
        gpu = current_gpu()
        return ("cuda", f"{gpu} is here") if wanted == "auto" else (wanted, f"asked for; {gpu} is here")
    if wanted == "cuda":
        raise BuildError(
            "device 'cuda': PyTorch finds no GPU here, and programs are compiled on the one they run on; "
            "use --device cpu, or install a CUDA build of PyTorch on a machine with a GPU"
        )
    return "cpu", "PyTorch finds no GPU here" if wanted == "auto" else "asked for"


def choose_expert_weights(
    wanted: Literal["auto", "plain", "packed", "int4"],
    model: ModelConfig,
    *,
    target: Target,
    dtype: str,
    device: Device,
    keep_onnx: bool,
) -> tuple[ExpertWeights, str]:
    """How the experts' weights are bound and the reason, to be shown to the user.

    Raises:
        BuildError: a format was asked for in which they cannot be.
    """
    cannot = ""
    if model.experts_dtype:
        cannot = f"the checkpoint's are {model.experts_dtype} and stay so; for others give the checkpoint that it was made from"
    elif target == "tensorrt":
        cannot = "kernels that take fewer bits are no TensorRT plugins; use --target inductor"
    elif keep_onnx:
        cannot = "ONNX programs have plain ones alone; leave out --keep-onnx"
    elif dtype != "bfloat16" and wanted != "int4":
        cannot = f"the engine's dtype is {dtype}, and bfloat16 numbers are packed"
    if wanted in ("packed", "int4") and cannot:
        raise BuildError(f"expert_weights: got {wanted!r}, expected 'plain': {cannot}")
    if wanted != "auto":
        return wanted, "asked for"
    if cannot or device == "cpu":
        return "plain", cannot or "a CPU would unpack them whenever they are read"
    return "packed", "a GPU reads bfloat16 numbers in 12 bits"


def current_gpu() -> Gpu:
    return Gpu(name=torch.cuda.get_device_name(), compute_capability=torch.cuda.get_device_capability())


def versions(target: Target) -> dict[str, str]:
    """The tools of a target, whose versions an engine is bound to or should be known by."""
    if target != "tensorrt":
        return {}
    return {"tensorrt": importlib.import_module("tensorrt").__version__, "triton": importlib.metadata.version("triton")}


def compiler(
    build: BuildConfig, model: ModelConfig, *, timing_cache: Path | None = None, console: Console | None = None
) -> Compile:
    """What compiles the programs of one engine. timing_cache, console: see `builder.targets.tensorrt`."""
    if build.target == "inductor":
        return inductor.compile_program
    from builder.targets.tensorrt import PlanBuilder  # only here: it needs triton

    trt, trtp = importlib.import_module("tensorrt"), importlib.import_module("tensorrt.plugin")
    return PlanBuilder(trt, model, build, trtp=trtp, timing_cache=timing_cache, console=console).compile_program
