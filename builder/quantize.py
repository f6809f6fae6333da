"""`python -m builder quantize`: a checkpoint with the experts' weights in FP8 or NVFP4, everything else as it was.

Weights become float8_e4m3 with a float32 scale for each output channel; the error is that of blocks of 128 x 128, whose scales
cost more to apply (docs/fp8.md). Experts that are in FP8 already, by compressed-tensors, or in NVFP4, by it or by Model
Optimizer (docs/nvfp4.md), keep their numbers; such weights elsewhere are turned back into the checkpoint's dtype.

1. Check what headers tell, and plan a file a layer, and one for the rest. 2. Write each that no run before has written, one
expert after the other: a file at a time is in memory. 3. Write the index and the configuration, check all. 4. Put the finished
directory in place, in one rename.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from builder.config import read_model_config
from builder.errors import BuildError
from builder.quantization import CALLED, EXPERTS_ONLY, FP8, NVFP4, SCALE_SUFFIX
from builder.rewriting import INDEX, Content, by_layer, carried, file_name, finite, index, reading, record, write_files
from builder.staging import real_place
from builder.stored_nvfp4 import StoredNvfp4
from builder.stored_weights import StoredWeights
from builder.unfinished import check_is_new, unfinished
from builder.weights import (
    VISION_PREFIXES,
    Shapes,
    is_of_experts,
    layer_prefix,
    text_weights,
    vision_weights,
    with_encoder_weights,
)
from contract.checkpoint import Checkpoint
from contract.model_config import ExpertsDtype, ModelConfig
from plugins.moe.fp8 import from_fp8, to_fp8

PROJECTIONS = ("gate_up_proj", "down_proj")
_NOT_CARRIED = ("hf_quant_config.json",)
"""One of Model Optimizer's that tells of the tensors as they were."""

Errors = dict[int, dict[str, float]]
"""Layer → projection → Frobenius norm of the error, relative to that of the weights; 0 where the numbers are kept."""

Stored = StoredWeights | StoredNvfp4


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """`layer`: whose experts it takes; `others`: its tensors that stay as they are; `shapes`: of all its tensors."""

    layer: int | None
    others: list[str]
    shapes: Shapes


def quantize_checkpoint(
    checkpoint: Path, output: Path, *, console: Console | None = None, report: Callable[[str], None] = lambda line: None
) -> Errors:
    """Writes `output` from `checkpoint`. `console`: where the progress bar goes.

    Raises:
        BuildError, CheckpointError: see their messages; `output` is then as it was. Files that were finished stay beside it, in
            a hidden directory, for the next run.
    """
    # 1.
    model, tensors, place = read_model_config(checkpoint), Checkpoint(checkpoint), real_place(output)
    check_is_new(place)
    model = with_encoder_weights(model, tensors.names())
    if own := [name for name in model.encoder_weights if is_of_experts(name)]:
        raise BuildError(f"{own[0]}: experts of the encoder's own, expected the decoder's alone; quantize knows no others")
    stored: Stored = StoredNvfp4(tensors) if model.experts_dtype == NVFP4 else StoredWeights(tensors)
    stored.check(_expected(model.model_copy(update={"experts_dtype": None}), tensors))
    quantized, dtype = model.model_copy(update={"experts_dtype": model.experts_dtype or FP8}), getattr(torch, model.dtype)
    files, small = plan(quantized, stored), _carried(checkpoint, quantized.experts_dtype)
    with unfinished(place, record(tensors, model)) as written:
        found = {name: written.metadata(name, file.shapes) for name, file in files.items()}
        before = sum(metadata is not None for metadata in found.values())
        report(f"{checkpoint}: {len(files)} files to write, {before} of them written before")
        kept = ", whose numbers are kept" if model.experts_dtype else ""
        report(f"experts in {CALLED[quantized.experts_dtype]}{kept}")
        if isinstance(stored, StoredNvfp4):
            report(f"other weights in NVFP4: {len(stored.turned_back)}, which become {model.dtype}")
            report(f"scales of activations and of the cache: {len(stored.left_out)}, left out; both stay in full precision")
        # 2.

        def make(name: str) -> Content:
            file = files[name]
            with reading(checkpoint):
                content = {other: finite(other, stored.read(other, dtype).contiguous()) for other in file.others}
                of_layer = {} if file.layer is None else quantize_layer(model, stored, file.layer, content)
            return content, {"format": "pt"} | {f"error.{each}": repr(error) for each, error in of_layer.items()}

        write_files(written, found, make, title="quantizing", console=console)
        errors = {
            file.layer: {each: float(found[name][f"error.{each}"]) for each in PROJECTIONS}
            for name, file in files.items()
            if file.layer is not None
        }
        # 3.
        written.add(small | {INDEX: index({name: file.shapes for name, file in files.items()}, written.directory)})
        Checkpoint(written.directory).check(text_weights(quantized), ignored_prefixes=VISION_PREFIXES)
        # 4.
        written.put_in_place()
    report(f"{output} written")
    return errors


def _expected(model: ModelConfig, tensors: Checkpoint) -> Shapes:
    """Of the text model, and of its vision tower if the checkpoint has one."""
    has_vision = any(name.startswith(VISION_PREFIXES) for name in tensors.names())
    return text_weights(model) | (vision_weights(model) if has_vision else {})


def plan(quantized: ModelConfig, stored: Stored) -> dict[str, PlannedFile]:
    """By file name; what belongs to no layer is in the first. `quantized`: the model that is written."""
    contents, shapes = by_layer(stored.others(), quantized.num_layers), text_weights(quantized)
    files = {}
    for place, (layer, others) in enumerate(contents, 1):
        experts = [] if layer is None else [name for name in shapes if name.startswith(f"{layer_prefix(layer)}.experts.")]
        of_file = {name: stored.shape(name) for name in others} | {name: shapes[name] for name in experts}
        files[file_name(place, len(contents))] = PlannedFile(layer=layer, others=others, shapes=of_file)
    return files


def quantize_layer(model: ModelConfig, stored: Stored, layer: int, content: dict[str, Tensor]) -> dict[str, float]:
    """Adds the layer's experts and their scales to `content`; returns the relative error of each projection.

    Raises:
        BuildError: an expert has numbers that are not finite.
    """
    errors, shapes = {}, text_weights(model)
    for projection in PROJECTIONS:
        weights = f"{layer_prefix(layer)}.experts.{projection}"
        if isinstance(stored, StoredNvfp4):
            content[weights] = torch.stack([stored.expert(weights, expert) for expert in range(model.num_experts)])
            errors[projection] = 0.0
            continue
        shape = shapes[weights]
        numbers = torch.empty(shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(shape[:2], dtype=torch.float32)
        error = norm = 0.0
        for expert in range(model.num_experts):
            weight, scale = stored.expert(weights, expert)
            numbers[expert], scales[expert] = to_fp8(weight) if scale is None else (weight, scale)
            rounded = from_fp8(numbers[expert], scales[expert])
            if scale is None:
                difference = rounded - weight.float()
                error, norm = error + difference.square().sum().item(), norm + weight.float().square().sum().item()
            if not rounded.isfinite().all():
                raise BuildError(
                    f"{weights}: expert {expert} has numbers that are not finite, expected none; download the checkpoint again"
                )
        errors[projection] = (error / norm) ** 0.5 if norm else 0.0
        content[weights], content[f"{weights}{SCALE_SUFFIX}"] = numbers, scales
    return errors


def _carried(checkpoint: Path, experts_dtype: ExpertsDtype) -> dict[str, bytes]:
    """The small files of the output but the index.

    Raises:
        BuildError: one of the checkpoint's cannot be read.
    """
    files = carried(checkpoint, without=_NOT_CARRIED)
    config = json.loads(files["config.json"]) | {"quantization_config": EXPERTS_ONLY[experts_dtype]}
    return files | {"config.json": f"{json.dumps(config, indent=2)}\n".encode()}
