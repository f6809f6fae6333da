"""`python -m builder quantize`: a checkpoint with the experts' weights in FP8 or NVFP4, everything else as it was.

Weights become float8_e4m3 with a float32 scale for each output channel; the error is that of blocks of 128 x 128, whose scales
cost more to apply (docs/fp8.md). Experts that are in FP8 already, by compressed-tensors, or in NVFP4, by it or by Model
Optimizer (docs/nvfp4.md), keep their numbers; such weights elsewhere are turned back into the checkpoint's dtype.

1. Check what headers tell, and plan a file a layer, and one for the rest. 2. Write each that no run before has written, one
expert after the other: a file at a time is in memory. 3. Write the index and the configuration, check all. 4. Put the finished
directory in place, in one rename.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor

from builder.config import read_model_config
from builder.errors import BuildError
from builder.quantization import CALLED, EXPERTS_ONLY, FP8, NVFP4, SCALE_SUFFIX
from builder.staging import real_place
from builder.stored_nvfp4 import StoredNvfp4
from builder.stored_weights import StoredWeights
from builder.unfinished import check_is_new, unfinished
from builder.weights import CLIPPING, VISION_PREFIXES, Shapes, layer_prefix, text_weights, vision_weights
from contract.checkpoint import Checkpoint
from contract.model_config import ExpertsDtype, ModelConfig
from plugins.moe.fp8 import from_fp8, to_fp8

PROJECTIONS = ("gate_up_proj", "down_proj")
_INDEX = "model.safetensors.index.json"
_CARRIED, _NOT_CARRIED = (".json", ".jinja", ".model", ".txt"), ("hf_quant_config.json",)
"""Suffixes of the small files that go along; one of Model Optimizer's that tells of the tensors as they were."""

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
    stored: Stored = StoredNvfp4(tensors) if model.experts_dtype == NVFP4 else StoredWeights(tensors)
    stored.check(_expected(model.model_copy(update={"experts_dtype": None}), tensors))
    quantized, dtype = model.model_copy(update={"experts_dtype": model.experts_dtype or FP8}), getattr(torch, model.dtype)
    files, carried = plan(quantized, stored), _carried(checkpoint, quantized.experts_dtype)
    with unfinished(place, _record(model, tensors)) as written:
        found = {name: written.metadata(name, file.shapes) for name, file in files.items()}
        before = sum(metadata is not None for metadata in found.values())
        report(f"{checkpoint}: {len(files)} files to write, {before} of them written before")
        kept = ", whose numbers are kept" if model.experts_dtype else ""
        report(f"experts in {CALLED[quantized.experts_dtype]}{kept}")
        if isinstance(stored, StoredNvfp4):
            report(f"other weights in NVFP4: {len(stored.turned_back)}, which become {model.dtype}")
            report(f"scales of activations and of the cache: {len(stored.left_out)}, left out; both stay in full precision")
        # 2.
        errors: Errors = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=console is None) as progress:
            task = progress.add_task("quantizing", total=len(files))
            for name, file in files.items():
                metadata = found[name]
                if metadata is None:
                    with _reading(checkpoint):
                        content = {other: _finite(other, stored.read(other, dtype).contiguous()) for other in file.others}
                        of_layer = {} if file.layer is None else quantize_layer(model, stored, file.layer, content)
                    metadata = {"format": "pt"} | {f"error.{each}": repr(error) for each, error in of_layer.items()}
                    written.save(name, content, metadata)
                if file.layer is not None:
                    errors[file.layer] = {each: float(metadata[f"error.{each}"]) for each in PROJECTIONS}
                progress.advance(task)
        # 3.
        written.add(carried | {_INDEX: _index(files, written.directory)})
        Checkpoint(written.directory).check(text_weights(quantized), ignored_prefixes=VISION_PREFIXES)
        # 4.
        written.put_in_place()
    report(f"{output} written")
    return errors


def _expected(model: ModelConfig, tensors: Checkpoint) -> Shapes:
    """Of the text model, and of its vision tower if the checkpoint has one."""
    has_vision = any(name.startswith(VISION_PREFIXES) for name in tensors.names())
    return text_weights(model) | (vision_weights(model) if has_vision else {})


def _finite(name: str, tensor: Tensor) -> Tensor:
    """
    Raises:
        BuildError: some of its numbers are not finite; but a bound of the vision tower's may be infinite, for none.
    """
    wrong = tensor.isnan() if name.endswith(CLIPPING) else ~tensor.isfinite()
    if wrong.any():
        raise BuildError(f"{name}: has numbers that are not finite, expected none; download the checkpoint again")
    return tensor


def plan(quantized: ModelConfig, stored: Stored) -> dict[str, PlannedFile]:
    """By file name; what belongs to no layer is in the first. `quantized`: the model that is written."""
    rest, shapes = stored.others(), text_weights(quantized)
    layers = {}
    for layer in range(quantized.num_layers):
        layers[layer] = [name for name in rest if name.startswith(f"{layer_prefix(layer)}.")]
    of_layers = {name for names in layers.values() for name in names}
    contents: list[tuple[int | None, list[str]]] = [(None, [name for name in rest if name not in of_layers])]
    contents += layers.items()
    files = {}
    for place, (layer, others) in enumerate(contents, 1):
        experts = [] if layer is None else [name for name in shapes if name.startswith(f"{layer_prefix(layer)}.experts.")]
        of_file = {name: stored.shape(name) for name in others} | {name: shapes[name] for name in experts}
        files[f"model-{place:05}-of-{len(contents):05}.safetensors"] = PlannedFile(layer=layer, others=others, shapes=of_file)
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


def _record(model: ModelConfig, tensors: Checkpoint) -> bytes:
    """All that the files depend on.

    Raises:
        BuildError: the checkpoint cannot be read.
    """
    with _reading(tensors.directory):
        files = {name: each.model_dump() for name, each in tensors.fingerprint().items()}
    return json.dumps({"model": model.model_dump(mode="json"), "files": files}, sort_keys=True).encode()


def _carried(checkpoint: Path, experts_dtype: ExpertsDtype) -> dict[str, bytes]:
    """The small files of the output but the index.

    Raises:
        BuildError: one of the checkpoint's cannot be read.
    """
    files = {}
    with _reading(checkpoint):
        paths = [path for path in checkpoint.iterdir() if path.is_file() and path.suffix in _CARRIED]
        paths = [path for path in paths if path.name not in _NOT_CARRIED]
    for path in paths:
        with _reading(path):
            files[path.name] = path.read_bytes()
    config = json.loads(files["config.json"]) | {"quantization_config": EXPERTS_ONLY[experts_dtype]}
    return files | {"config.json": f"{json.dumps(config, indent=2)}\n".encode()}


def _index(files: dict[str, PlannedFile], directory: Path) -> bytes:
    weight_map = {tensor: name for name, file in files.items() for tensor in file.shapes}
    total_bytes = sum((directory / name).stat().st_size for name in files)
    return f"{json.dumps({'metadata': {'total_size': total_bytes}, 'weight_map': weight_map}, indent=1)}\n".encode()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """
    Raises:
        BuildError: the block cannot read what is there.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BuildError(f"{path}: cannot be read ({error}); give access to it, or download it again") from error
