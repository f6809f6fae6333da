"""What an engine is, apart from its programs: the weights it binds, made of a checkpoint's configuration and tensors."""

import hashlib
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

from builder.errors import BuildError
from builder.stored_weights import check_layout
from builder.targets import current_gpu, versions
from builder.weights import (
    CAST_FROM,
    VISION_PREFIXES,
    Bound,
    all_weights,
    bound_weights,
    weight_dtype,
    with_encoder_weights,
)
from contract.checkpoint import Checkpoint
from contract.cpu import this_cpu
from contract.manifest import FORMAT_VERSION, BuildConfig, Manifest, Weight
from contract.manifest import Checkpoint as CheckpointRecord
from contract.model_config import ModelConfig
from contract.problems import in_few_lines
from plugins import PLUGIN_ABI


def checked(tensors: Checkpoint, model: ModelConfig) -> tuple[ModelConfig, dict[str, tuple[int, ...]]]:
    """What the checkpoint's tensors make of its configuration, without a vision tower where there are none for it, with the
    encoder's own weights; and their shapes.

    Raises:
        CheckpointError, BuildError: tensors that are missing, unexpected, or not of the shape, layout or dtype that they
            should have.
    """
    if model.vision and not any(name.startswith(VISION_PREFIXES) for name in tensors.names()):
        model = model.model_copy(update={"vision": None})
    model = with_encoder_weights(model, tensors.names())
    shapes = all_weights(model)
    if model.experts_dtype:
        check_layout(tensors, shapes, model.experts_dtype)
    tensors.check(shapes, ignored_prefixes=() if model.vision else VISION_PREFIXES)
    _check_dtypes(tensors, model, shapes)
    return model, shapes


def _check_dtypes(tensors: Checkpoint, model: ModelConfig, names: Iterable[str]) -> None:
    dtypes = {name: weight_dtype(name, model, model.dtype) for name in names}
    expected = {name: CAST_FROM if dtype in CAST_FROM else (dtype,) for name, dtype in dtypes.items()}
    if problems := tensors.of_other_dtypes(expected):
        raise BuildError(in_few_lines(tensors.directory, problems))


class ConfigAlone:
    """What `describe` asks of a checkpoint, where there is a config.json and no tensors yet: dtypes as the config has them."""

    def __init__(self, model: ModelConfig):
        self._model = model

    def dtype(self, name: str) -> str:
        return weight_dtype(name, self._model, self._model.dtype)

    def fingerprint(self) -> dict:
        return {}


def describe(
    model: ModelConfig,
    build: BuildConfig,
    tensors: Checkpoint | ConfigAlone,
    shapes: dict[str, tuple[int, ...]],
    checkpoint: Path,
    engine: Path,
) -> Manifest:
    """Everything about the engine but its programs. `shapes`: of the checkpoint's tensors that the programs read."""
    weights = {
        binding: Weight(
            tensors=bound.tensors,
            shape=bound.shape,
            dtype=bound.dtype,
            transform=_transform(bound, {tensors.dtype(name) for name in bound.tensors}),
            arrangement=bound.arrangement,
            part=bound.part,
        )
        for binding, bound in bound_weights(shapes, model, build).items()
    }
    path = os.path.relpath(os.path.realpath(checkpoint), os.path.realpath(engine))
    return Manifest(
        format_version=FORMAT_VERSION,
        plugin_abi=PLUGIN_ABI,
        build=build,
        gpu=current_gpu() if build.device == "cuda" else None,
        model=model,
        programs={},
        files={},
        weights=weights,
        checkpoint=CheckpointRecord(path=path, files=tensors.fingerprint()),
        tools={"python": platform.python_version(), "torch": torch.__version__, "cpu": this_cpu()} | versions(build.target),
        source_digest=_source_digest(),
    )


def _transform(bound: Bound, stored: set[str]) -> Literal["none", "cast", "arrange"]:
    """What becomes of tensors that are stored in these dtypes."""
    if bound.arrangement:
        return "arrange"
    return "none" if stored == {bound.dtype} else "cast"


def _source_digest() -> str:
    """A digest of the code that shapes an engine, so that a changed builder rebuilds."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    sources = (path for folder in ("builder", "contract", "plugins") for path in (root / folder).rglob("*"))
    for path in sorted(path for path in sources if path.suffix in (".py", ".cpp", ".h")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
