"""Binds an engine's weights: tensors of the checkpoint's own files.

On the CPU they are mapped, and not copied unless a transform is to be done. For a GPU they are read and copied there as
`weight_loading` does it, so that the host never holds more than its readers' buffers.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from backend.load_progress import ShowProgress, show_progress
from backend.weight_lanes import CudaCopies, HostLane, StagedLane
from backend.weight_loading import Transform, Wanted, load, reading
from contract.checkpoint import Checkpoint, CheckpointError, Extent
from contract.manifest import FILE_NAME, Manifest, ManifestError, Part, Weight
from plugins.moe.formats import OF_BFLOAT16, in_format


def bind_weights(
    manifest: Manifest, engine_dir: Path, checkpoint_dir: Path | None = None, show: ShowProgress = show_progress
) -> dict[str, torch.Tensor]:
    """Weight binding → tensor on the device that the engine was built for.

    `checkpoint_dir` overrides the path in the manifest, for a checkpoint that has moved. `show` is told how far reading is.

    1. See that the checkpoint's files are those that the engine was built from. 2. Map what can be used as it lies in them.
    3. Read the rest. 4. See that the files are still the same.

    Raises:
        ManifestError: the manifest has tensors that are not in these files.
        CheckpointError: the checkpoint is not there, its files are not those that the engine was built from, or they change
            while they are being read.
    """
    directory = Path(os.path.realpath(checkpoint_dir or engine_dir / manifest.checkpoint.path))
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such directory; expected the checkpoint that engine {engine_dir} was built from; "
            f"move it back, or build again from where it is now: python -m builder build CHECKPOINT {engine_dir}"
        )
    checkpoint, device = Checkpoint(directory), torch.device(manifest.build.device)
    with _unchanged(checkpoint):  # 4.
        _check_files(manifest, engine_dir, directory, checkpoint)  # 1.
        _check_tensors(manifest, engine_dir, checkpoint)
        weights, wanted = {}, []
        for binding, weight in manifest.weights.items():
            whole = len(weight.tensors) == 1 and not weight.part
            if device.type == "cpu" and weight.transform == "none" and whole:  # 2.
                weights[binding] = checkpoint.tensor(*weight.tensors)
                continue
            there = torch.device("cuda", weight.part.number) if weight.part and device.type == "cuda" else device
            weights[binding] = torch.empty(weight.shape, dtype=getattr(torch, weight.dtype), device=there)
            wanted += _wanted(checkpoint, weight, weights[binding])
        if wanted:  # 3.
            with show(sum(each.extent.num_bytes for each in wanted)) as advance:
                load(wanted, _lanes(device, manifest.build.expert_gpus), **reading(device.type)._asdict(), advance=advance)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what transforms took, on each reader's stream
    return weights


def _wanted(checkpoint: Checkpoint, weight: Weight, target: torch.Tensor) -> Iterator[Wanted]:
    """The checkpoint's tensors, each to its part of `target`."""
    extents = [_part(checkpoint.extent(name), weight.part) for name in weight.tensors]
    parts = target.split([extent.shape[0] for extent in extents]) if len(extents) > 1 else [target]
    for name, extent, part in zip(weight.tensors, extents, parts, strict=True):
        stored = getattr(torch, checkpoint.dtype(name))
        yield Wanted(extent=extent, stored=stored, target=part, transform=transform_of(weight))


def _part(extent: Extent, part: Part | None) -> Extent:
    if part is None:
        return extent
    num_bytes, (count, *within) = extent.num_bytes // part.of, extent.shape
    offset = extent.offset + part.number * num_bytes
    return replace(extent, offset=offset, num_bytes=num_bytes, shape=(count // part.of, *within))


def transform_of(weight: Weight) -> Transform | None:
    """What the manifest's `Weight.transform` stands for."""
    if weight.transform == "none":
        return None
    if weight.transform == "cast":
        return lambda stored, dtype: stored.to(dtype)
    wanted, halves = weight.arrangement.format, weight.arrangement.halves
    return lambda stored, dtype: in_format(stored.bfloat16() if wanted in OF_BFLOAT16 else stored, wanted, halves)


def _lanes(device: torch.device, num_gpus: int):
    if device.type == "cpu":
        return HostLane
    after = [torch.cuda.current_stream(gpu) for gpu in range(num_gpus)]
    return lambda most_bytes: StagedLane(most_bytes, CudaCopies(after))


def _check_files(manifest: Manifest, engine_dir: Path, directory: Path, checkpoint: Checkpoint) -> None:
    actual = checkpoint.fingerprint()
    for name, expected in manifest.checkpoint.files.items():
        if actual.get(name) != expected:
            got = f"{actual[name].size_bytes} bytes, other content" if name in actual else "no such file"
            raise CheckpointError(
                f"{directory / name}: got {got}, expected the {expected.size_bytes} bytes that engine {engine_dir} was built "
                "from; build the engine again"
            )


def _check_tensors(manifest: Manifest, engine_dir: Path, checkpoint: Checkpoint) -> None:
    """
    Raises:
        ManifestError: the manifest has other tensors than the files that it was made from, and is damaged.
    """
    for binding, weight in manifest.weights.items():
        known = weight.tensors and checkpoint.names() >= set(weight.tensors)
        if not known or (weight.transform != "arrange" and weight.shape != _shape(weight, checkpoint)):
            raise ManifestError(
                f"{engine_dir / FILE_NAME}: {binding}: got {', '.join(weight.tensors) or 'no tensor'} as {list(weight.shape)}, "
                "which the checkpoint does not have; build the engine again with --force"
            )


def _shape(weight: Weight, checkpoint: Checkpoint) -> tuple[int, ...]:
    """That the tensors have, one after the other along the first axis, or a part of one."""
    first, *others = (_part(checkpoint.extent(name), weight.part).shape for name in weight.tensors)
    return (sum(shape[0] for shape in (first, *others)), *first[1:]) if others else first


@contextmanager
def _unchanged(checkpoint: Checkpoint) -> Iterator[None]:
    """
    Raises:
        CheckpointError: a file is another one after the block, or was written within it.
    """
    before = checkpoint.stamps()
    yield
    for name, after in checkpoint.stamps().items():
        if after != before[name]:
            size = "no such file" if after is None else f"{after.size_bytes} bytes"
            raise CheckpointError(
                f"{checkpoint.directory / name}: got {size}, expected the {before[name].size_bytes} bytes that were there "
                "before; it changed while it was being loaded; start again when it is complete"
            )
