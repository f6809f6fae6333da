"""Kernels as TensorRT plugins, in the quickly deployable ahead-of-time form: one plugin a kernel, its PTX inside the plan.

A plan that holds such plugins needs neither Python nor this package when it runs. What the plugin tells TensorRT comes from
the kernel's own `Launch`:

    register    output shapes, as expressions of the input shapes
    autotune    the one combination of types and formats: the declared dtypes, linear
    aot_impl    the kernel's PTX, its grid as expressions, and its int32 scalars

A plugin has no workspace: scratch is an output that nobody reads later, and is not zeroed. Kernels take their arguments in
the order in which TensorRT passes them: inputs, scalars, outputs. This module imports no tensorrt; it is given the package
`tensorrt.plugin`, which is described in
https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/pluginGuide.html
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy.typing  # noqa: F401 - tensorrt.plugin looks into it without importing it
import torch
from triton.backends.compiler import GPUTarget

from plugins.plugin_ptx import HOPPER, compile_for_plugin
from plugins.symbolic_launch import Describe, Operand, describe_symbolically
from plugins.triton_launch import Launch

NAMESPACE = "diffusiongemma"
VERSION = "1"
"""What quickly deployable plugins always register as."""

_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "HALF",
    torch.float32: "FLOAT",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.bool: "BOOL",
}
"""PyTorch's dtype → the name in `tensorrt.DataType`."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """An output's rank and its dtype: one of PyTorch's, or the name of the input whose dtype it has."""

    name: str
    rank: int
    dtype: torch.dtype | str


@dataclass(frozen=True, kw_only=True)
class KernelPlugin:
    """One kernel as a plugin.

    op_type: of its ONNX node, which TensorRT finds the plugin by. attributes: of the node, all ints, all required.
    describe: (inputs, **attributes) → the launch.
    """

    op_type: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    outputs: tuple[Output, ...]
    describe: Describe

    def launch(self, operands: Iterable[Operand], attributes: dict[str, int]) -> Launch:
        """The launch for inputs whose sizes are ints or expressions; see `describe_symbolically`.

        Raises:
            ValueError: the inputs, attributes or outputs are not those that the plugin declares.
        """
        operands = tuple(operands)
        if len(operands) != len(self.inputs):
            raise ValueError(f"plugin {self.op_type}: got {len(operands)} inputs, expected {', '.join(self.inputs)}")
        if set(attributes) != set(self.attributes):
            raise ValueError(f"plugin {self.op_type}: got attributes {sorted(attributes)}, expected {sorted(self.attributes)}")
        launch = describe_symbolically(self.describe, operands, attributes)
        dtypes = dict(zip(self.inputs, (operand.dtype for operand in operands), strict=True))
        declared = [(output.rank, self.dtype(output, dtypes)) for output in self.outputs]
        described = [(len(output.shape), output.dtype) for output in launch.outputs]
        if declared != described:
            raise ValueError(f"plugin {self.op_type}: declares outputs {declared}, its launch has {described}")
        return launch

    def dtype(self, output: Output, dtypes: dict[str, torch.dtype]) -> torch.dtype:
        return dtypes[output.dtype] if isinstance(output.dtype, str) else output.dtype


def register(plugins: Iterable[KernelPlugin], trt: ModuleType, trtp: ModuleType, target: GPUTarget = HOPPER) -> None:
    """Registers the plugins with TensorRT, for kernels compiled for `target`. Those that are registered already stay.

    trt, trtp: the packages `tensorrt` and `tensorrt.plugin`.
    """
    for plugin in plugins:
        if not hasattr(getattr(trtp.op, NAMESPACE, None), plugin.op_type):
            _register(plugin, trt, trtp, target)


def _register(plugin: KernelPlugin, trt: ModuleType, trtp: ModuleType, target: GPUTarget) -> None:
    plugin_id = f"{NAMESPACE}::{plugin.op_type}"
    num_inputs, num_outputs = len(plugin.inputs), len(plugin.outputs)
    torch_dtypes = {getattr(trt.DataType, name): dtype for dtype, name in _DTYPES.items()}
    trt_dtypes = {dtype: getattr(trt.DataType, name) for dtype, name in _DTYPES.items()}

    def dtype(name: str, desc: Any) -> torch.dtype:
        if desc.dtype not in torch_dtypes:
            raise ValueError(f"plugin {plugin.op_type}: input {name} has type {desc.dtype}, which no kernel takes")
        return torch_dtypes[desc.dtype]

    def operand(name: str, desc: Any) -> Operand:
        shape = tuple(size.constant_value() if size.is_constant else size for size in desc.shape_expr)
        return Operand(dtype=dtype(name, desc), shape=shape)

    def launch(descs: tuple[Any, ...], attributes: dict[str, int]) -> Launch:
        return plugin.launch(map(operand, plugin.inputs, descs), attributes)

    def describe(*descs: Any, **attributes: int) -> Any:
        if any(size.is_fake for desc in descs for size in desc.shape_expr):  # TensorRT asks for types before there are shapes
            dtypes = {name: dtype(name, desc) for name, desc in zip(plugin.inputs, descs, strict=True)}
            outputs = tuple(
                trtp.from_shape_expr(
                    tuple(trtp.ShapeExpr() for _ in range(output.rank)), trt_dtypes[plugin.dtype(output, dtypes)]
                )
                for output in plugin.outputs
            )
        else:
            outputs = tuple(
                trtp.from_shape_expr(each.shape, trt_dtypes[each.dtype]) for each in launch(descs, attributes).outputs
            )
        return outputs if num_outputs > 1 else outputs[0]

    def autotune(*arguments: Any) -> list[Any]:
        descs = [*arguments[:num_inputs], *arguments[-1]]
        types = ", ".join(_AUTOTUNE_NAMES[torch_dtypes[desc.dtype]] for desc in descs)
        return [trtp.AutoTuneCombination(types, "LINEAR")]

    def aot_impl(*arguments: Any) -> tuple[str, str, Any, Any]:
        attributes = dict(zip(plugin.attributes, arguments[num_inputs:-2], strict=True))
        described = launch(arguments[:num_inputs], attributes)
        kernel = compile_for_plugin(described, target)
        parameters = trtp.KernelLaunchParams()
        for axis, programs in zip("xyz", described.grid, strict=False):
            setattr(parameters, f"grid_{axis}", programs)
        parameters.block_x = kernel.num_threads
        parameters.shared_mem = kernel.shared_bytes
        scalars = trtp.SymIntExprs(len(described.scalars))
        for place, scalar in enumerate(described.scalars):
            scalars[place] = trtp.SymInt32(scalar)
        return kernel.name, kernel.ptx, parameters, scalars

    inputs = dict.fromkeys(plugin.inputs, trtp.TensorDesc)
    attributes = dict.fromkeys(plugin.attributes, int)
    outputs = tuple[(trtp.TensorDesc,) * num_outputs]
    implementation = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    returned = outputs if num_outputs > 1 else trtp.TensorDesc
    trtp.register(plugin_id)(_typed(describe, inputs | attributes, returned))
    trtp.autotune(plugin_id)(_typed(autotune, inputs | attributes | {"outputs": outputs}, list[trtp.AutoTuneCombination]))
    trtp.aot_impl(plugin_id)(_typed(aot_impl, inputs | attributes | {"outputs": outputs, "tactic": int}, implementation))


_AUTOTUNE_NAMES = _DTYPES | {torch.float16: "FP16", torch.float32: "FP32"}
"""PyTorch's dtype → the name in an `AutoTuneCombination`."""


def _typed(function: Callable[..., Any], parameters: dict[str, type], returned: Any) -> Callable[..., Any]:
    """`function` with the signature that TensorRT reads off it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

    @functools.wraps(function)
    def wrapped(*arguments: Any, **attributes: Any) -> Any:
        return function(*arguments, **attributes)

    wrapped.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()],
        return_annotation=returned,
    )
    return wrapped
