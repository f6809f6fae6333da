"""Binds an engine's weights: tensors of the checkpoint's own files, mapped and not copied unless the engine's dtype differs."""

from pathlib import Path

import torch

from contract.checkpoint import Checkpoint, CheckpointError
from contract.manifest import Manifest


def bind_weights(manifest: Manifest, engine_dir: Path, checkpoint_dir: Path | None = None) -> dict[str, torch.Tensor]:
    """Weight binding → tensor on the CPU.

    `checkpoint_dir` overrides the path in the manifest, for a checkpoint that has moved.

    Raises:
        CheckpointError: the checkpoint is not there, or its files are not those that the engine was built from.
    """
    directory = checkpoint_dir or engine_dir / manifest.checkpoint.path
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such directory; expected the checkpoint that engine {engine_dir} was built from; "
            "put it back, give its new place, or build the engine again"
        )
    checkpoint = Checkpoint(directory.resolve())
    actual = checkpoint.fingerprint()
    for name, expected in manifest.checkpoint.files.items():
        if actual.get(name) != expected:
            got = f"{actual[name].size_bytes} bytes, other content" if name in actual else "no such file"
            raise CheckpointError(
                f"{directory / name}: got {got}, expected the {expected.size_bytes} bytes that engine {engine_dir} was built "
                "from; build the engine again"
            )
    weights = {}
    for binding, weight in manifest.weights.items():
        tensor = checkpoint.tensor(weight.tensor)
        weights[binding] = tensor.to(getattr(torch, weight.dtype)) if weight.transform == "cast" else tensor
    return weights
