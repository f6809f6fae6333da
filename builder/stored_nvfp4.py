"""The weights of a checkpoint in NVFP4, as NVIDIA's Model Optimizer and compressed-tensors store them.

| of a weight X.weight [R, C] | Model Optimizer | compressed-tensors |
|---|---|---|
| two numbers a byte [R, C / 2] uint8 | X.weight | X.weight_packed |
| a scale for 16 numbers [R, C / 16] e4m3 | X.weight_scale | X.weight_scale |
| one factor, float32 | X.weight_scale_2 | 1 / X.weight_global_scale |

The experts' have such three for each expert and projection, `experts.<e>.gate_proj.weight` and so on. Any other weight may have
them, or be a tensor as it is. Scales that were measured for activations or for the cache are left out: rows and the cache stay
in full precision.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from builder.errors import BuildError
from builder.quantization import FP8
from builder.stored_weights import by_itself, joined, of_vision, unexpected_line
from builder.weights import CAST_FROM, Shapes, is_of_experts
from contract.checkpoint import Checkpoint
from plugins.moe.fp8 import from_fp8
from plugins.moe.nvfp4 import GROUP, NVFP4_DTYPE, all_finite, numbers_of, row_bytes, rows_of

_PACKED, _LEFT_OUT = "_packed", ("input_scale", "input_global_scale", "k_scale", "v_scale", "k_global_scale", "v_global_scale")


class _Parts(NamedTuple):
    """Names of the tensors of one weight."""

    numbers: str
    scales: str
    factor: str

    @classmethod
    def of(cls, weight: str, packed: bool) -> "_Parts":
        if packed:
            return cls(weight + _PACKED, f"{weight}_scale", f"{weight}_global_scale")
        return cls(weight, f"{weight}_scale", f"{weight}_scale_2")

    @property
    def inverse(self) -> bool:
        return self.numbers.endswith(_PACKED)


class StoredNvfp4:
    """Reads one expert's projection or one other tensor at a time, of weights that were checked.

    turned_back: weights in NVFP4 outside of the experts. left_out: scales that are not used.
    """

    def __init__(self, tensors: Checkpoint):
        self.tensors = tensors
        self.names = set(tensors.names())
        numbers = [name for name in self.names if tensors.dtype(name) == NVFP4_DTYPE]
        found = [_Parts.of(name.removesuffix(_PACKED), name.endswith(_PACKED)) for name in numbers]
        self._parts = {each.scales.removesuffix("_scale"): each for each in found}
        self.turned_back = sorted(name for name in self._parts if ".experts." not in name)
        self.left_out = sorted(name for name in self.names if name.endswith(_LEFT_OUT))

    def others(self) -> list[str]:
        """Every weight that is not part of an expert."""
        parts = {part for each in self._parts.values() for part in each} | set(self.left_out)
        return sorted(name for name in (self.names - parts) | self._parts.keys() if ".experts." not in name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight's numbers."""
        if name not in self._parts:
            return self.tensors.shape(name)
        *outer, pairs = self.tensors.shape(self._parts[name].numbers)
        return *outer, 2 * pairs

    def check(self, shapes: Shapes) -> None:
        """As `StoredWeights.check`, of weights none of which is in NVFP4.

        Raises:
            BuildError: tensors that are missing, unexpected, or of another shape or dtype, a line for each of the first of a
                kind.
        """
        for name in shapes:
            if is_of_experts(name) and name in self.names:
                raise BuildError(f"{self.tensors.directory}: {name}: {self._not_by_itself(name, shapes[name])}")
        packed, read, dtypes = any(each.inverse for each in self._parts.values()), {}, {}
        for name, shape in shapes.items():
            in_nvfp4 = {name: shape} if name in self._parts and len(shape) == 2 else {}
            if is_of_experts(name):
                experts = [by_itself(name, expert) for expert in range(shape[0])]
                in_nvfp4 = {part: (shape[1] // len(parts), shape[2]) for parts in experts for part in parts}
            for weight, (rows, columns) in in_nvfp4.items():
                parts = self._parts.get(weight) or _Parts.of(weight, packed)
                read |= {parts.numbers: (rows, columns // 2), parts.scales: (rows, columns // GROUP)}
                read[parts.factor] = (1,) if self._shape_of(parts.factor) == (1,) else ()
                dtypes |= {parts.numbers: (NVFP4_DTYPE,), parts.scales: (FP8,), parts.factor: ("float32",)}
            if not in_nvfp4:
                read[name], dtypes[name] = shape, CAST_FROM
        vision = of_vision(self.names, shapes)
        read |= {part: self._shape_of(part) for name in of_vision(self._parts, shapes) for part in self._parts[name]}
        unexpected = [unexpected_line(name) for name in sorted(self.names - read.keys() - vision - set(self.left_out))]
        others = self.tensors.of_other_dtypes({name: dtypes[name] for name in dtypes.keys() & self.names})
        if problems := self.tensors.problems(read, unexpected, others):
            raise BuildError(problems)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Any weight but an expert's, NVFP4 turned back into `dtype`. Raises as `expert`."""
        if name not in self._parts:
            return self.tensors.tensor(name)
        return from_fp8(*numbers_of(self._rows(name))).to(dtype)

    def expert(self, name: str, expert: int) -> Tensor:
        """One expert's part of the experts' weight `name`, row by row (`plugins.moe.nvfp4`).

        Raises:
            BuildError: some of its numbers are not finite.
        """
        return joined([self._rows(part) for part in by_itself(name, expert)])

    def _rows(self, name: str) -> Tensor:
        parts = self._parts[name]
        factor = self.tensors.tensor(parts.factor).float()
        factor = 1 / factor if parts.inverse else factor
        rows = rows_of(self.tensors.tensor(parts.numbers), self.tensors.tensor(parts.scales), factor)
        if not all_finite(rows):
            raise BuildError(f"{name}: has numbers that are not finite, expected none; download the checkpoint again")
        return rows

    def _shape_of(self, name: str) -> tuple[int, ...]:
        """(): of one that is not there."""
        return self.tensors.shape(name) if name in self.names else ()

    def _not_by_itself(self, name: str, shape: tuple[int, ...]) -> str:
        """What is wrong with experts that are in one tensor."""
        if name in self._parts and self._shape_of(name)[-1] == row_bytes(shape[-1]):
            return "has the experts as quantize writes them; give this checkpoint to build"
        return (
            f"got the experts of a layer in one tensor of {self.tensors.dtype(name)}, expected each by itself in NVFP4; "
            "the tool that made the checkpoint left them out: give quantize the original"
        )
