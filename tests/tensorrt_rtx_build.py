"""Builds an ONNX model with TensorRT-RTX, a real TensorRT builder that needs no GPU, and reports what it was built from."""

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import sympy
import tensorrt_rtx as trt

from contract.manifest import Binding

COMPUTE_CAPABILITY = trt.ComputeCapability.SM89  # the nearest to Hopper's 9.0 that TensorRT-RTX has


@dataclass(frozen=True, kw_only=True)
class RtxBuild:
    """A plan with the network it was built from.

    inputs, outputs: in the network's order; a size that varies is -1. profiles: input → its minimum and maximum shape, where a
    size varies. messages: errors of the parser and the builder.
    """

    plan: bytes
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    profiles: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    messages: tuple[str, ...]
    seconds: float
    peak_bytes: int


def build_plan(model: onnx.ModelProto, limits: Mapping[str, tuple[int, int]]) -> RtxBuild:
    """Parses and builds `model`, strongly typed; `limits` are the minimum and maximum of each named size."""
    started = time.monotonic()
    logger = _Errors()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), logger.messages
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(COMPUTE_CAPABILITY, 0)
    profile = builder.create_optimization_profile()
    for value in model.graph.input:
        sizes = [each.dim_value or each.dim_param for each in value.type.tensor_type.shape.dim]
        if any(isinstance(size, str) for size in sizes):
            least, most = (
                [_size(size, {name: each[end] for name, each in limits.items()}) for size in sizes] for end in (0, 1)
            )
            profile.set_shape(value.name, min=least, opt=most, max=most)
    assert config.add_optimization_profile(profile) == 0
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, logger.messages
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    shapes = {each.name: profile.get_shape(each.name) for each in inputs if -1 in tuple(each.shape)}
    return RtxBuild(
        plan=bytes(plan),
        inputs=tuple(map(_binding, inputs)),
        outputs=tuple(map(_binding, outputs)),
        profiles={name: (tuple(least), tuple(most)) for name, (least, _, most) in shapes.items()},
        messages=tuple(logger.messages),
        seconds=time.monotonic() - started,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


class _Errors(trt.ILogger):
    """Keeps what is worse than a warning; every plugin's input is a warning, for nothing in the cut network reads it."""

    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.messages.append(message)


def _size(size: int | str, values: Mapping[str, int]) -> int:
    """A named size, a fixed one, or a product such as "256*sequences"."""
    if isinstance(size, int) or size in values:
        return values.get(size, size)
    return int(sympy.sympify(size).subs({sympy.Symbol(name): value for name, value in values.items()}))


def _binding(tensor: trt.ITensor) -> Binding:
    names = {trt.bfloat16: "bfloat16", trt.float32: "float32", trt.int32: "int32", trt.int64: "int64"}
    return Binding(name=tensor.name, dtype=names[tensor.dtype], shape=tuple(tensor.shape))
