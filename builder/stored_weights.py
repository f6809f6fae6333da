"""The weights of a checkpoint, whichever way they are stored: as they are, or in FP8 by compressed-tensors.

| weight | stored as |
|---|---|
| experts.gate_up_proj [E, 2 F, D] | the tensor; or `experts.gate_up_proj.weight`; or for every expert e `experts.<e>.gate_proj.weight` and `experts.<e>.up_proj.weight` |
| experts.down_proj [E, D, F] | the tensor; or `experts.down_proj.weight`; or `experts.<e>.down_proj.weight` |
| any other X.weight | the tensor |

A tensor T in FP8 has a tensor T + "_scale" beside it: one number for each output channel, or one for all.
"""  # noqa: E501

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from builder.errors import BuildError
from builder.quantization import FP8, SCALE_SUFFIX
from builder.weights import CAST_FROM, VISION_PREFIXES, is_of_experts
from contract.checkpoint import Checkpoint
from plugins.moe.fp8 import from_fp8

_OF_ONE_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class StoredWeights:
    """Reads one expert's projection or one other tensor at a time."""

    def __init__(self, tensors: Checkpoint):
        self.tensors = tensors
        self.names = set(tensors.names())

    def others(self) -> list[str]:
        """Every tensor that is neither part of an expert nor a scale.

        Raises:
            BuildError: a scale that belongs to no weight.
        """
        scales = {name for name in self.names if name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in self.names}
        strange = sorted(name for name in self.names if name.endswith(("input_scale", "output_scale", "k_scale", "v_scale")))
        if strange:
            raise BuildError(f"{strange[0]}: a fixed scale of activations, expected none; quantize the original checkpoint")
        return sorted(name for name in self.names - scales if not self._is_of_experts(name))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compares what will be read with `shapes`, those of the text model's weights, none in FP8.

        Raises:
            BuildError: one line for each tensor that is missing, unexpected, or of another shape or dtype.
        """
        plain = {name: shape for name, shape in shapes.items() if not is_of_experts(name)}
        of_layers = {
            f"{name}{suffix}": shape for name, shape in shapes.items() if is_of_experts(name) for suffix in ("", ".weight")
        }
        of_one = {name: int(match[1]) for name in self.names if (match := _OF_ONE_EXPERT.search(name))}
        num_experts = next(iter(of_layers.values()))[0]
        others = self.others()
        problems = self.tensors.missing(plain)
        problems += [
            f"{name}: unexpected tensor; quantize does not know what it is for"
            for name in others
            if name not in plain and not name.startswith(VISION_PREFIXES)
        ]
        problems += [
            f"{name}: unexpected tensor, expected {num_experts} experts"
            for name, expert in sorted(of_one.items())
            if expert >= num_experts
        ]
        problems += self.tensors.misshapen(plain | of_layers)
        read = [*others, *(of_layers.keys() & self.names), *(name for name in of_one if name.endswith(".weight"))]
        problems += self.tensors.of_other_dtypes(dict.fromkeys(read, (*CAST_FROM, FP8)))
        if problems:
            raise BuildError("\n".join(f"{self.tensors.directory}: {problem}" for problem in problems))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Any tensor but an expert's, FP8 turned back into `dtype`."""
        numbers, scale = self._numbers(name)
        return numbers if scale is None else from_fp8(numbers, scale).to(dtype)

    def expert(self, prefix: str, projection: str, expert: int) -> tuple[Tensor, Tensor | None]:
        """One expert's `projection`, "gate_up_proj" or "down_proj", and its scales, one for a channel; None: not in FP8.

        Raises:
            BuildError: it is stored in none of the ways above.
        """
        for fused in (f"{prefix}.{projection}", f"{prefix}.{projection}.weight"):
            if fused in self.names:
                return self._numbers(fused, expert)
        names = [f"{prefix}.{expert}.{part}.weight" for part in _PARTS[projection]]
        missing = [name for name in names if name not in self.names]
        if missing:
            raise BuildError(f"{missing[0]}: missing, and so is {prefix}.{projection}; download the checkpoint again")
        parts = [self._numbers(name) for name in names]
        scales = [scale for _, scale in parts if scale is not None]
        if scales and len(scales) < len(parts):
            raise BuildError(f"{names[0]}: in FP8 or not, expected the same of {names[-1]}")
        return _joined([numbers for numbers, _ in parts]), torch.cat(scales) if scales else None

    def _numbers(self, name: str, expert: int | None = None) -> tuple[Tensor, Tensor | None]:
        numbers = self.tensors.tensor(name)
        numbers = numbers if expert is None else numbers[expert]
        if self.tensors.dtype(name) != FP8:
            return numbers, None
        if name + SCALE_SUFFIX not in self.names:
            raise BuildError(f"{name}: in FP8 without {name}{SCALE_SUFFIX}; download the checkpoint again")
        scale = self.tensors.tensor(name + SCALE_SUFFIX).float()
        if expert is not None and scale.numel() > 1:
            scale = scale[expert]
        if scale.numel() not in (1, numbers.shape[0]):
            raise BuildError(
                f"{name}{SCALE_SUFFIX}: got shape {list(scale.shape)}, expected a scale for each of {numbers.shape[0]} channels"
            )
        return numbers, scale.flatten().expand(numbers.shape[0])

    def _is_of_experts(self, name: str) -> bool:
        return _OF_ONE_EXPERT.search(name) is not None or re.search(r"\.experts\.(gate_up|down)_proj\b", name) is not None


def check_fp8_layout(tensors: Checkpoint, expected: Iterable[str]) -> None:
    """Checks that FP8 is where `quantize` writes it; `expected`: the names that the engine binds.

    Raises:
        BuildError: FP8 weights elsewhere, or experts in another dtype or layout.
    """
    names, expected = set(tensors.names()), set(expected)
    remedy = "rewrite the checkpoint with: python -m builder quantize CHECKPOINT OUTPUT"
    for name in sorted(expected):
        if name not in names and ".experts." in name:
            raise BuildError(f"{name}: missing, expected the experts of a layer in one tensor; {remedy}")
    for name in sorted(names & expected):
        if (tensors.dtype(name) == FP8) != is_of_experts(name):
            wanted = FP8 if is_of_experts(name) else "no FP8 outside of the experts"
            raise BuildError(f"{name}: got {tensors.dtype(name)}, expected {wanted}; {remedy}")


def _joined(parts: list[Tensor]) -> Tensor:
    """torch.cat, which has no FP8 on every device: of bytes."""
    if parts[0].dtype != torch.float8_e4m3fn:
        return torch.cat(parts)
    return torch.cat([part.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
