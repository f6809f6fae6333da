"""`python -m builder quantize`: a checkpoint with the experts' weights in FP8, everything else as it was.

Weights become float8_e4m3 with a float32 scale for each output channel; the error is that of blocks of 128 x 128, whose scales
cost more to apply (docs/fp8.md). What is in FP8 already, by compressed-tensors, keeps its numbers; FP8 weights outside of the
experts are turned back into the checkpoint's dtype.

1. Plan a file a layer, and one for the rest. 2. Write each, one expert after the other, first under a temporary name: a file at
a time is in memory. 3. Write the index and the configuration, check all. 4. Put the finished directory in place, in one rename.

Until then files are collected in a directory beside the output. A run that was cut off is continued: files that are there and
made from the same checkpoint are kept.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from builder.config import read_model_config
from builder.errors import BuildError
from builder.quantization import EXPERTS_ONLY, FP8, SCALE_SUFFIX
from builder.staging import real_place, writing
from builder.stored_weights import StoredWeights
from builder.weights import VISION_PREFIXES, layer_prefix, text_weights
from contract.checkpoint import Checkpoint
from contract.model_config import ModelConfig
from plugins.moe.fp8 import from_fp8, to_fp8

PROJECTIONS = ("gate_up_proj", "down_proj")
_INDEX = "model.safetensors.index.json"
_SOURCE = "source.json"
"""In the unfinished directory: fingerprints of the checkpoint that it is made from."""

Errors = dict[int, dict[str, float]]
"""Layer → projection → Frobenius norm of the error, relative to that of the weights; 0 where the weights were in FP8."""


def quantize_checkpoint(
    checkpoint: Path, output: Path, *, console: Console | None = None, report: Callable[[str], None] = lambda line: None
) -> Errors:
    """Writes `output` from `checkpoint`. `console`: where the progress bar goes.

    Raises:
        BuildError, CheckpointError: see their messages; `output` is then not there.
    """
    # 1.
    model, tensors, place = read_model_config(checkpoint), Checkpoint(checkpoint), real_place(output)
    stored, dtype = StoredWeights(tensors), getattr(torch, model.dtype)
    if place.exists():
        raise BuildError(f"{output}: is there already; expected a new directory, remove it or choose another")
    stored.check(text_weights(model.model_copy(update={"experts_dtype": None})))
    files = plan(model, stored)
    working = place.parent / f".{place.name}.unfinished"
    with writing(place):
        done = _continued(working, {name: each.model_dump() for name, each in tensors.fingerprint().items()})
        report(f"{checkpoint}: {len(files)} files to write, {len(done & set(files))} of them written before")
        # 2.
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=console is None) as progress:
            task = progress.add_task("quantizing", total=len(files))
            for name, (layer, others) in files.items():
                if name not in done:
                    content = {other: stored.read(other, dtype).contiguous() for other in others}
                    errors = {} if layer is None else quantize_layer(model, stored, layer, content)
                    metadata = {"format": "pt"} | {f"error.{projection}": repr(error) for projection, error in errors.items()}
                    save_file(content, working / f"{name}.writing", metadata)
                    (working / f"{name}.writing").chmod(0o644)  # safetensors gives access to the owner alone
                    os.replace(working / f"{name}.writing", working / name)
                progress.advance(task)
        # 3.
        errors = _finish(checkpoint, working, files)
        quantized = model.model_copy(update={"experts_dtype": FP8})
        Checkpoint(working).check(text_weights(quantized), ignored_prefixes=VISION_PREFIXES)
        # 4.
        (working / _SOURCE).unlink()
        os.replace(working, place)
    report(f"{output} written")
    return errors


def plan(model: ModelConfig, stored: StoredWeights) -> dict[str, tuple[int | None, list[str]]]:
    """File → the layer whose experts it takes, and its other tensors; what belongs to no layer is in the first file."""
    rest = stored.others()
    layers = {}
    for layer in range(model.num_layers):
        layers[layer] = [name for name in rest if name.startswith(f"{layer_prefix(layer)}.")]
    of_layers = {name for names in layers.values() for name in names}
    contents: list[tuple[int | None, list[str]]] = [(None, [name for name in rest if name not in of_layers])]
    contents += layers.items()
    return {f"model-{place:05}-of-{len(contents):05}.safetensors": each for place, each in enumerate(contents, 1)}


def quantize_layer(model: ModelConfig, stored: StoredWeights, layer: int, content: dict[str, Tensor]) -> dict[str, float]:
    """Adds the layer's experts and their scales to `content`; returns the relative error of each projection."""
    prefix, errors = f"{layer_prefix(layer)}.experts", {}
    shapes = text_weights(model)
    for projection in PROJECTIONS:
        shape = shapes[f"{prefix}.{projection}"]
        numbers = torch.empty(shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(shape[:2], dtype=torch.float32)
        error = norm = 0.0
        for expert in range(model.num_experts):
            weight, scale = stored.expert(prefix, projection, expert)
            if tuple(weight.shape) != shape[1:]:
                raise BuildError(
                    f"{prefix}.{projection}: expert {expert} has shape {list(weight.shape)}, expected {list(shape[1:])}"
                )
            if scale is None:
                numbers[expert], scales[expert] = to_fp8(weight)
                difference = from_fp8(numbers[expert], scales[expert]) - weight.float()
                error, norm = error + difference.square().sum().item(), norm + weight.float().square().sum().item()
            else:
                numbers[expert], scales[expert] = weight, scale
        errors[projection] = (error / norm) ** 0.5 if norm else 0.0
        content[f"{prefix}.{projection}"], content[f"{prefix}.{projection}{SCALE_SUFFIX}"] = numbers, scales
    return errors


def _continued(working: Path, source: dict[str, object]) -> set[str]:
    """Makes `working` ready and returns the files in it that are finished; begins again where another checkpoint was read."""
    record = json.dumps(source, sort_keys=True)
    path = working / _SOURCE
    if path.exists() and path.read_text() == record:
        return {file.name for file in working.glob("*.safetensors")}
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    path.write_text(record)
    return set()


def _finish(checkpoint: Path, working: Path, files: dict[str, tuple[int | None, list[str]]]) -> Errors:
    """Writes the index and the configuration, copies the other small files; returns the errors noted in the files."""
    weight_map, total_bytes, errors = {}, 0, {}
    for name, (layer, _) in files.items():
        with safe_open(working / name, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
            if layer is not None:
                errors[layer] = {projection: float(file.metadata()[f"error.{projection}"]) for projection in PROJECTIONS}
        total_bytes += (working / name).stat().st_size
    (working / _INDEX).write_text(
        json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=1) + "\n"
    )
    config = json.loads((checkpoint / "config.json").read_text()) | {"quantization_config": EXPERTS_ONLY}
    (working / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in checkpoint.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt") and not (working / file.name).exists():
            shutil.copyfile(file, working / file.name)
    for leftover in working.glob("*.writing"):
        leftover.unlink()
    return errors
