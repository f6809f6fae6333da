"""The tensors of a checkpoint directory: safetensors files, one or sharded, memory-mapped and never copied."""

import json
import os
from collections.abc import KeysView, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from contract.fingerprint import FileFingerprint
from contract.problems import in_few_lines, of_another_model, printable
from contract.regular_file import regular

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn", "U8": "uint8"}


class CheckpointError(Exception):
    """A checkpoint that cannot be used: one line for each problem, or for the first ones of many."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Where a tensor of `shape` lies: `num_bytes` bytes from `offset` on in `path`."""

    path: Path
    offset: int
    num_bytes: int
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FileStamp:
    """What the file system says of a file; two equal stamps of a path: nobody has replaced or written the file between them."""

    inode: int
    size_bytes: int
    changed_ns: int


class Checkpoint:
    """The tensors of one directory by name. Opening reads headers only; `tensor` maps pages of the file.

    Raises:
        CheckpointError: no safetensors files, an index that names missing files, files that are truncated or damaged, or
            a tensor in two; every problem is listed.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._file_of: dict[str, str] = {}
        self._files = {}
        self._extents: dict[str, Extent] = {}
        problems: list[str] = []
        for name in self._file_names():
            path = directory / name
            try:
                opened = safe_open(regular(path), framework="pt")
            except FileNotFoundError:  # also where there is no permission
                if os.path.exists(path):
                    problems.append(f"{path}: cannot be read; give access to it")
                else:
                    problems.append(f"{path}: missing; {_INDEX} lists it, download the checkpoint again")
                continue
            except (SafetensorError, OSError, ValueError) as error:
                problems.append(f"{path}: truncated or damaged ({error}); download this file again")
                continue
            self._files[name] = opened
            found = opened.keys()
            if again := sorted(self._file_of.keys() & found):  # of which tools that do not look would take the last
                others = f"{len(again)} tensors of other files" if len(again) > 1 else "a tensor of another file"
                problems.append(
                    f"{path}: holds {others}, {again[0]} of {self._file_of[again[0]]}, expected each in one; download the "
                    "checkpoint again"
                )
            self._file_of.update(dict.fromkeys(found, name))
            self._extents.update(_extents(path))
        if problems:
            raise CheckpointError("\n".join(problems))

    def _file_names(self) -> list[str]:
        """The single file if it is there, like transformers: an index beside it is left over from a save in shards."""
        index_path = self.directory / _INDEX
        if (self.directory / _SINGLE).exists():
            return [_SINGLE]
        if not index_path.exists():
            raise CheckpointError(f"{self.directory}: found neither {_SINGLE} nor {_INDEX}; expected a Hugging Face checkpoint")
        try:
            names = set(json.loads(regular(index_path).read_text())["weight_map"].values())
            if not all(isinstance(name, str) for name in names):
                raise TypeError("a file name that is no string")
            if odd := [name for name in sorted(names) if printable(name) != name]:
                raise ValueError(f"{odd[0]!r}, a file name that cannot be printed")
            if outside := [name for name in sorted(names) if os.path.isabs(name) or ".." in Path(name).parts]:
                raise ValueError(f"{outside[0]!r}, a file outside of its directory")
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index_path}: not a safetensors index ({error!r}); download it again") from None
        return sorted(names)

    def names(self) -> KeysView[str]:
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._file_of[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """PyTorch's name of the dtype, "bfloat16" say; the safetensors name where PyTorch has none we use."""
        stored = self._files[self._file_of[name]].get_slice(name).get_dtype()
        return _DTYPES.get(stored, stored)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as a view of the mapped file: no bytes are read until they are used."""
        return self._files[self._file_of[name]].get_tensor(name)

    def extent(self, name: str) -> Extent:
        """Where the tensor lies, for who reads it without mapping."""
        return self._extents[name]

    def check(self, expected: Mapping[str, tuple[int, ...]], *, ignored_prefixes: tuple[str, ...] = ()) -> None:
        """Compares names and shapes with `expected`; tensors under `ignored_prefixes` may be there.

        Raises:
            CheckpointError: missing, unexpected or wrongly shaped tensors, a line for each of the first of a kind.
        """
        unexpected = [
            f"{name}: unexpected tensor; this builder does not know what it is for"
            for name in sorted(self.names() - expected.keys())
            if not name.startswith(ignored_prefixes)
        ]
        if problems := self.problems(expected, unexpected):
            raise CheckpointError(problems)

    def problems(self, expected: Mapping[str, tuple[int, ...]], unexpected: Sequence[str], *others: Sequence[str]) -> str:
        """What is wrong with tensors that are `expected` in these shapes, a line for each of the first of a kind; "": nothing.
        unexpected, others: lines that the caller has."""
        missing, misshapen = self._missing(expected), self._misshapen(expected)
        foreign = of_another_model(len(missing) + len(misshapen), len(expected))
        return in_few_lines(self.directory, foreign, missing, unexpected, misshapen, *others)

    def _missing(self, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
        """A line for each tensor that is not there."""
        return [f"{name}: missing, expected shape {list(expected[name])}" for name in sorted(expected.keys() - self.names())]

    def _misshapen(self, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
        """A line for each tensor that is there in another shape."""
        return [
            f"{name}: got shape {list(self.shape(name))}, expected {list(expected[name])}"
            for name in sorted(expected.keys() & self.names())
            if self.shape(name) != tuple(expected[name])
        ]

    def of_other_dtypes(self, expected: Mapping[str, Sequence[str]]) -> list[str]:
        """A line for each tensor whose dtype is none of those `expected` has for it."""
        return [
            f"{name}: got {self.dtype(name)}, expected one of {', '.join(dtypes)}; save it again as one"
            for name, dtypes in sorted(expected.items())
            if self.dtype(name) not in dtypes
        ]

    def fingerprint(self) -> dict[str, FileFingerprint]:
        """File name → fingerprint, for every file that holds tensors."""
        return {name: FileFingerprint.of(self.directory / name) for name in sorted(self._files)}

    def stamps(self) -> dict[str, FileStamp | None]:
        """File name → stamp, for every file that holds tensors; None for one that is no longer there."""
        return {name: _stamp(self.directory / name) for name in sorted(self._files)}


def _extents(path: Path) -> dict[str, Extent]:
    """Of every tensor in a safetensors file: the header's length in 8 bytes, the header, the data, which offsets count from."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    return {
        name: Extent(
            path=path,
            offset=8 + header_bytes + entry["data_offsets"][0],
            num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _stamp(path: Path) -> FileStamp | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return FileStamp(inode=found.st_ino, size_bytes=found.st_size, changed_ns=found.st_mtime_ns)
