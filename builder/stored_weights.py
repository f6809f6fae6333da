"""The weights of a checkpoint, whichever way they are stored: as they are, or in FP8 by compressed-tensors.

| weight | stored as |
|---|---|
| experts.gate_up_proj [E, 2 F, D] | the tensor; or `experts.gate_up_proj.weight`; or for every expert e `experts.<e>.gate_proj.weight` and `experts.<e>.up_proj.weight` |
| experts.down_proj [E, D, F] | the tensor; or `experts.down_proj.weight`; or `experts.<e>.down_proj.weight` |
| any other X.weight | the tensor |

A tensor T in FP8 has a tensor T + "_scale" beside it: one number for each output channel, or one for all.
"""  # noqa: E501

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from builder.errors import BuildError
from builder.quantization import FP8, SCALE_SUFFIX
from builder.weights import CAST_FROM, VISION_PREFIXES, Shapes, is_of_experts
from contract.checkpoint import Checkpoint
from plugins.moe.fp8 import from_fp8
from plugins.moe.nvfp4 import NVFP4_DTYPE

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_SCALES_OF_ACTIVATIONS = ("input_scale", "output_scale", "k_scale", "v_scale")


class StoredWeights:
    """Reads one expert's projection or one other tensor at a time, of weights that were checked."""

    def __init__(self, tensors: Checkpoint):
        self.tensors = tensors
        self.names = set(tensors.names())
        self.in_fp8 = {name for name in self.names if tensors.dtype(name) == FP8}
        self.scales = {name + SCALE_SUFFIX for name in self.in_fp8} & self.names

    def others(self) -> list[str]:
        """Every tensor that is neither part of an expert nor a scale."""
        return sorted(name for name in self.names - self.scales if ".experts." not in name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors.shape(name)

    def check(self, shapes: Shapes) -> None:
        """Compares what will be read with `shapes`, those of the model's weights, none in FP8. Reads headers only. Where
        `shapes` has no vision tower, one that is there is taken as it is.

        Raises:
            BuildError: tensors that are missing, unexpected, or of another shape or dtype, a line for each of the first of a
                kind.
        """
        read: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            read |= self._stored_as(name, shape) if is_of_experts(name) else {name: shape}
        vision = {name for name in of_vision(self.names, shapes) if not name.endswith(_SCALES_OF_ACTIVATIONS)}
        known = self.names & (read.keys() | vision) - self.scales
        dtypes = dict.fromkeys(known, (*CAST_FROM, FP8)) | dict.fromkeys(self.scales, CAST_FROM)
        of_missing = {name + SCALE_SUFFIX for name in read.keys() - self.names}
        unexpected = [_unexpected(name) for name in sorted(self.names - known - self.scales - of_missing)]
        others = self.tensors.of_other_dtypes(dtypes), self._of_other_scales(read)
        if problems := self.tensors.problems(read, unexpected, *others):
            raise BuildError(problems)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Any tensor but an expert's, FP8 turned back into `dtype`."""
        numbers, scale = self._numbers(name)
        return numbers if scale is None else from_fp8(numbers, scale).to(dtype)

    def expert(self, name: str, expert: int) -> tuple[Tensor, Tensor | None]:
        """One expert's part of the experts' weight `name`, and its scales, one for a channel; None: not in FP8."""
        for together in _together(name):
            if together in self.names:
                return self._numbers(together, expert)
        parts = [self._numbers(part) for part in by_itself(name, expert)]
        scales = [scale for _, scale in parts if scale is not None]
        return joined([numbers for numbers, _ in parts]), torch.cat(scales) if scales else None

    def _stored_as(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The tensors that the experts' weight `name` is read from, and their shapes; where there are none, itself."""
        for together in _together(name):
            if together in self.names:
                return {together: shape}
        experts = [by_itself(name, expert) for expert in range(shape[0])]
        each = {part: (shape[1] // len(parts), shape[2]) for parts in experts for part in parts}
        return each if each.keys() & self.names else {name: shape}

    def _of_other_scales(self, read: Shapes) -> list[str]:
        """A line for each tensor in FP8 whose scale is missing or of another shape, and for each expert half in FP8."""
        problems = []
        for name in sorted(self.in_fp8):
            shape, scale = self.tensors.shape(name), name + SCALE_SUFFIX
            if scale not in self.names:
                problems.append(f"{name}: in FP8 without {scale}; download the checkpoint again")
                continue
            got, num_channels = self.tensors.shape(scale), math.prod(shape[:-1])
            if math.prod(got) != 1 and (got[:1] != shape[:1] or math.prod(got) not in (shape[0], num_channels)):
                problems.append(f"{scale}: got shape {list(got)}, expected a scale for each of {num_channels} channels")
        for gate in sorted(read):
            up = gate.replace(".gate_proj.", ".up_proj.")
            if ".experts." in gate and up in self.names and (gate in self.in_fp8) != (up in self.in_fp8):
                problems.append(f"{gate}: in FP8 or not, expected the same of {up}")
        return problems

    def _numbers(self, name: str, expert: int | None = None) -> tuple[Tensor, Tensor | None]:
        numbers = self.tensors.tensor(name)
        numbers = numbers if expert is None else numbers[expert]
        if name not in self.in_fp8:
            return numbers, None
        scale = self.tensors.tensor(name + SCALE_SUFFIX).float()
        if expert is not None and scale.numel() > 1:
            scale = scale[expert]
        return numbers, scale.flatten().expand(numbers.shape[0])


def _together(name: str) -> tuple[str, ...]:
    """Names of a tensor that holds the experts' weight `name` of all experts."""
    return name, f"{name}.weight"


def by_itself(name: str, expert: int) -> list[str]:
    """The tensors that hold one expert's part of it."""
    prefix, _, projection = name.rpartition(".")
    return [f"{prefix}.{expert}.{part}.weight" for part in _PARTS[projection]]


def _unexpected(name: str) -> str:
    if name.endswith(_SCALES_OF_ACTIVATIONS):
        return f"{name}: a fixed scale of activations, expected none; quantize the original checkpoint"
    return unexpected_line(name)


def of_vision(names: Iterable[str], expected: Shapes) -> set[str]:
    """Those that are a vision tower's, where it is not among what is `expected`."""
    if any(name.startswith(VISION_PREFIXES) for name in expected):
        return set()
    return {name for name in names if name.startswith(VISION_PREFIXES)}


def unexpected_line(name: str) -> str:
    """The line for a tensor that has no place in what is quantized."""
    return f"{name}: unexpected tensor; quantize does not know what it is for"


def check_layout(tensors: Checkpoint, expected: Iterable[str], experts_dtype: str) -> None:
    """Checks that FP8 or NVFP4 is where `quantize` writes it; `expected`: the names that the engine binds.

    Raises:
        BuildError: such weights elsewhere, or experts in another dtype or layout.
    """
    stored, called = (FP8, "FP8") if experts_dtype == FP8 else (NVFP4_DTYPE, "NVFP4")
    names, expected = set(tensors.names()), set(expected)
    remedy = "rewrite the checkpoint with: python -m builder quantize CHECKPOINT OUTPUT"
    for name in sorted(expected):
        if name not in names and ".experts." in name:
            raise BuildError(f"{name}: missing, expected the experts of a layer in one tensor; {remedy}")
    for name in sorted(names & expected):
        if (tensors.dtype(name) == stored) != is_of_experts(name):
            wanted = stored if is_of_experts(name) else f"no {called} outside of the experts"
            raise BuildError(f"{name}: got {tensors.dtype(name)}, expected {wanted}; {remedy}")


def joined(parts: list[Tensor]) -> Tensor:
    """torch.cat, which has no FP8 on every device: of bytes."""
    if parts[0].dtype != torch.float8_e4m3fn:
        return torch.cat(parts)
    return torch.cat([part.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
