"""Binds an engine's weights: tensors of the checkpoint's own files.

On the CPU they are mapped, and not copied unless the engine's dtype differs. For a GPU they are copied there one after the
other, so that the host never holds more than the pages of the files that are being read.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from contract.checkpoint import Checkpoint, CheckpointError
from contract.manifest import Manifest

Report = Callable[[str], None]

_REPORT_INTERVAL_S = 5.0


def to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def bind_weights(
    manifest: Manifest, engine_dir: Path, checkpoint_dir: Path | None = None, report: Report = to_standard_error
) -> dict[str, torch.Tensor]:
    """Weight binding → tensor on the device that the engine was built for.

    `checkpoint_dir` overrides the path in the manifest, for a checkpoint that has moved. `report` is called every few seconds.

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
    loaded_bytes, reported = 0, time.monotonic()
    for binding, weight in manifest.weights.items():
        tensor = checkpoint.tensor(weight.tensor).to(manifest.build.device)
        weights[binding] = tensor.to(getattr(torch, weight.dtype)) if weight.transform == "cast" else tensor
        loaded_bytes += weights[binding].nbytes
        if time.monotonic() - reported >= _REPORT_INTERVAL_S:
            report(f"weights: {loaded_bytes / 1e9:.1f} GB loaded, {len(weights)} of {len(manifest.weights)} tensors")
            reported = time.monotonic()
    return weights
