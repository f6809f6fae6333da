"""TensorRT's own Python plugin package, run without TensorRT's libraries.

`tensorrt.plugin` is Python: it checks what plugins register and turns it into what the builder calls. It comes with the
package tensorrt-cu13-bindings; its native half does not load without libnvinfer. Here that half is TensorRT-RTX's, which has
the same types and enumerations, and stand-ins for what only the builder makes: expressions of sizes, and the request for an
ahead-of-time plugin. `Built` then calls a plugin in the order in which TensorRT does, with attributes as the ONNX parser
passes them (its `loadFields`: in the order of the creator's fields, ints as int32).
"""

import enum
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest

rtx = pytest.importorskip("tensorrt_rtx", reason="stands in for TensorRT's native types")

DYNAMIC = -1


class Expression:
    """A size in TensorRT's terms: a build-time constant, or known once the shapes of a call are. IDimensionExpr."""

    def __init__(self, value: int | Callable[["Shapes"], int]):
        self._value = value

    def is_constant(self) -> bool:
        return isinstance(self._value, int)

    def get_constant_value(self) -> int:
        assert isinstance(self._value, int)
        return self._value

    def at(self, shapes: "Shapes") -> int:
        return self._value if isinstance(self._value, int) else self._value(shapes)


Shapes = Sequence[Sequence[int]]
"""The inputs' shapes at a call."""

_OPERATIONS = {
    "SUM": lambda left, right: left + right,
    "SUB": lambda left, right: left - right,
    "PROD": lambda left, right: left * right,
    "FLOOR_DIV": lambda left, right: left // right,
    "CEIL_DIV": lambda left, right: -(-left // right),
    "MAX": max,
    "MIN": min,
}


class ExpressionBuilder:
    """IExprBuilder."""

    def constant(self, value: int) -> Expression:
        assert type(value) is int
        return Expression(value)

    def operation(self, operation: Any, left: Expression, right: Expression) -> Expression:
        compute = _OPERATIONS[operation.name]
        if left.is_constant() and right.is_constant():
            return Expression(compute(left.get_constant_value(), right.get_constant_value()))
        return Expression(lambda shapes: compute(left.at(shapes), right.at(shapes)))


class _SizeExpressions(list):
    """DimsExprs."""

    def __init__(self, length: int):
        super().__init__([None] * length)


class _ScalarExpression:
    """ISymExpr; the plugin package fills in type, dtype and expr."""


class _Request(enum.Enum):
    UNKNOWN, PREFER_JIT, PREFER_AOT, STRICT_JIT, STRICT_AOT = range(5)


class _AheadOfTimeBuild:
    """IPluginV3QuickAOTBuild."""


class _Creator:
    """IPluginCreatorV3Quick."""


class _Registry:
    def __init__(self):
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        assert creator.plugin_namespace == namespace
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


def load() -> tuple[ModuleType, ModuleType]:
    """Fresh copies of `tensorrt` (stand-in) and `tensorrt.plugin` (the real one), which nobody else can import."""
    bindings = importlib.util.find_spec("tensorrt_bindings")  # does not import it
    if bindings is None:
        pytest.skip("tensorrt-cu13-bindings is not installed: it holds TensorRT's own checks of plugins")
    trt = ModuleType("tensorrt")
    vars(trt).update({name: value for name, value in vars(rtx).items() if not name.startswith("__")})
    registry = _Registry()
    trt.IDimensionExpr = Expression
    trt.DimsExprs = _SizeExpressions
    trt.ISymExpr = _ScalarExpression
    trt.QuickPluginCreationRequest = _Request
    trt.IPluginV3QuickAOTBuild = _AheadOfTimeBuild
    trt.IPluginCreatorV3Quick = _Creator
    trt.get_plugin_registry = lambda: registry
    path = f"{next(iter(bindings.submodule_search_locations))}/plugin"
    spec = importlib.util.spec_from_file_location("tensorrt.plugin", f"{path}/__init__.py", submodule_search_locations=[path])
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "tensorrt"}
    try:
        sys.modules["tensorrt"] = trt
        sys.modules["tensorrt.plugin"] = trtp = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(trtp)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt"]:
            del sys.modules[name]
        sys.modules.update(before)
    return trt, trtp


@dataclass(frozen=True, kw_only=True)
class Input:
    """A plugin's input as the network has it: TensorRT's type, and sizes with -1 where they vary."""

    dtype: Any
    shape: tuple[int, ...]


class _LaunchParameters:
    """IKernelLaunchParams."""

    __slots__ = ("block_x", "block_y", "block_z", "grid_x", "grid_y", "grid_z", "shared_mem")


class _Scalars:
    """ISymExprs."""

    nbSymExprs = 0  # noqa: N815 - TensorRT's name

    def __init__(self):
        self.scalars: dict[int, _ScalarExpression] = {}

    def __setitem__(self, place: int, scalar: _ScalarExpression) -> None:
        assert place < self.nbSymExprs
        self.scalars[place] = scalar


@dataclass(frozen=True, kw_only=True)
class LaunchAt:
    """What TensorRT would launch at some shapes."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    scalars: tuple[int, ...]
    output_shapes: list[tuple[int, ...]]


class Built:
    """One layer of a registered plugin after TensorRT has built it."""

    def __init__(self, trt: ModuleType, plugin_id: str, inputs: Sequence[Input], attributes: dict[str, int]):
        namespace, name = plugin_id.split("::")
        creator = trt.get_plugin_registry().get_creator(name, "1", namespace)
        fields = [
            trt.PluginField(field.name, np.array([attributes[field.name]], dtype=np.int32), trt.PluginFieldType.INT32)
            for field in creator.field_names
            if field.name in attributes
        ]
        plugin = creator.create_plugin(
            name, namespace, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD, _Request.STRICT_AOT
        )
        assert isinstance(plugin, _AheadOfTimeBuild)
        self.output_types = plugin.get_output_data_types([each.dtype for each in inputs], [len(each.shape) for each in inputs])
        sizes = []
        for place, each in enumerate(inputs):
            shape = _SizeExpressions(len(each.shape))
            for axis, size in enumerate(each.shape):
                shape[axis] = Expression(
                    size if size != DYNAMIC else lambda shapes, place=place, axis=axis: shapes[place][axis]
                )
            sizes.append(shape)
        self._output_sizes = plugin.get_output_shapes(sizes, [], ExpressionBuilder())
        outputs = [
            Input(dtype=dtype, shape=tuple(_size(size) for size in shape))
            for dtype, shape in zip(self.output_types, self._output_sizes, strict=True)
        ]
        self.output_shapes = [output.shape for output in outputs]
        tensors = [_description(trt, each) for each in (*inputs, *outputs)]
        self.formats = plugin.get_supported_format_combinations(tensors, len(inputs))
        plugin.configure_plugin(tensors[: len(inputs)], tensors[len(inputs) :])
        assert plugin.get_valid_tactics() == []
        plugin.set_tactic(0)
        self._parameters, scalars = _LaunchParameters(), _Scalars()
        plugin.get_launch_params(sizes, tensors, len(inputs), self._parameters, scalars, ExpressionBuilder())
        assert len(scalars.scalars) == scalars.nbSymExprs
        self._scalars = [scalars.scalars[place] for place in range(scalars.nbSymExprs)]
        assert all(scalar.dtype == trt.PluginArgDataType.INT32 for scalar in self._scalars)
        descriptions = [each.desc for each in tensors]
        self.kernel_name, ptx = plugin.get_kernel(descriptions[: len(inputs)], descriptions[len(inputs) :])
        self.ptx = ptx.decode()

    def at(self, *shapes: Sequence[int]) -> LaunchAt:
        """What is launched for inputs of these shapes."""

        def values(prefix: str) -> tuple[int, int, int]:
            return tuple(getattr(self._parameters, f"{prefix}_{axis}").expr.at(shapes) for axis in "xyz")

        return LaunchAt(
            grid=values("grid"),
            block=values("block"),
            shared_bytes=self._parameters.shared_mem.expr.at(shapes),
            scalars=tuple(scalar.expr.at(shapes) for scalar in self._scalars),
            output_shapes=[tuple(size.at(shapes) for size in shape) for shape in self._output_sizes],
        )


def _size(size: Expression) -> int:
    return size.get_constant_value() if size.is_constant() else DYNAMIC


def _description(trt: ModuleType, tensor: Input) -> Any:
    described = trt.DynamicPluginTensorDesc()
    desc = trt.PluginTensorDesc()
    desc.dims, desc.type, desc.format, desc.scale = tensor.shape, tensor.dtype, trt.TensorFormat.LINEAR, 1.0
    described.desc = desc
    return described
