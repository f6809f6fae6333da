"""A checkpoint that is written anew, a file a layer: what `quantize` and `merge` have in common."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor

from builder.errors import BuildError
from builder.unfinished import SOURCE, Unfinished
from builder.weights import CLIPPING, layer_prefix
from contract.checkpoint import Checkpoint
from contract.model_config import ModelConfig

INDEX = "model.safetensors.index.json"
_CARRIED = (".json", ".jinja", ".model", ".txt")
"""Suffixes of the small files that go along."""


def by_layer(names: Iterable[str], num_layers: int) -> list[tuple[int | None, list[str]]]:
    """Each layer with its tensors, those of both passes; before them, with None, what belongs to no layer."""
    rest, layers = set(names), []
    for layer in range(num_layers):
        prefixes = tuple(f"{layer_prefix(layer, encoder=encoder)}." for encoder in (False, True))
        layers.append((layer, sorted(name for name in rest if name.startswith(prefixes))))
        rest -= set(layers[-1][1])
    return [(None, sorted(rest)), *layers]


def file_name(place: int, count: int) -> str:
    """place: from 1."""
    return f"model-{place:05}-of-{count:05}.safetensors"


def record(tensors: Checkpoint, model: ModelConfig, **others: object) -> bytes:
    """All that the files depend on. others: besides the checkpoint.

    Raises:
        BuildError: the checkpoint cannot be read.
    """
    with reading(tensors.directory):
        files = {name: each.model_dump() for name, each in tensors.fingerprint().items()}
    return json.dumps({"model": model.model_dump(mode="json"), "files": files, **others}, sort_keys=True).encode()


def carried(checkpoint: Path, *, without: Sequence[str] = ()) -> dict[str, bytes]:
    """Name → content of the small files that go along; the index, which does not, is among them. What a run that was killed
    at its end has left in the checkpoint is not.

    Raises:
        BuildError: one of them cannot be read.
    """
    files = {}
    with reading(checkpoint):
        paths = [
            path
            for path in checkpoint.iterdir()
            if (path.is_file() or not path.exists()) and path.suffix in _CARRIED and path.name not in (*without, SOURCE)
        ]
    for path in paths:
        with reading(path):
            files[path.name] = path.read_bytes()
    return files


def index(files: Mapping[str, Iterable[str]], directory: Path) -> bytes:
    """files: name → the tensors in it."""
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    total_bytes = sum((directory / name).stat().st_size for name in files)
    return f"{json.dumps({'metadata': {'total_size': total_bytes}, 'weight_map': weight_map}, indent=1)}\n".encode()


Content = tuple[dict[str, Tensor], dict[str, str]]
"""A file's tensors and its metadata."""


def write_files(
    written: Unfinished,
    found: dict[str, dict[str, str] | None],
    make: Callable[[str], Content],
    *,
    title: str,
    console: Console | None,
) -> None:
    """Writes each file of which no metadata is `found`, and puts that there. make: of a file's name. `console`: where the
    progress bar goes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None) as progress:
        for name in progress.track(list(found), description=title):
            if found[name] is None:
                content, metadata = make(name)
                written.save(name, content, metadata)
                found[name] = metadata


def finite(name: str, tensor: Tensor) -> Tensor:
    """
    Raises:
        BuildError: some of its numbers are not finite; but a bound of the vision tower's may be infinite, for none.
    """
    has_no_infinity = tensor.dtype == torch.float8_e4m3fn  # for which PyTorch has no `isfinite`
    wrong = tensor.isnan() if name.endswith(CLIPPING) or has_no_infinity else ~tensor.isfinite()
    if wrong.any():
        raise BuildError(f"{name}: has numbers that are not finite, expected none; download the checkpoint again")
    return tensor


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """
    Raises:
        BuildError: the block cannot read what is there.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BuildError(f"{path}: cannot be read ({error}); give access to it, or download it again") from error
