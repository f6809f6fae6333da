"""As much of TensorRT as the builder and the session call, strict: what TensorRT does not have, or would refuse, is refused.

Types and enumerations are TensorRT-RTX's own, plugins go through TensorRT's own Python (`tensorrt_validators`). A plan is
JSON of what the network came to; an execution context runs a Python function on the memory at the addresses that it was given.
"""

import ctypes
import json
from collections.abc import Callable
from typing import Any

import onnx
import tensorrt_validators as validators
import torch

VERSION = "11.4.0"
Run = Callable[[str, dict[str, torch.Tensor]], list[torch.Tensor]]
"""(engine name, inputs by binding) → outputs, in the network's order."""

_TORCH = {"FLOAT": torch.float32, "BF16": torch.bfloat16, "INT32": torch.int32, "INT64": torch.int64}
_ONNX = {1: "FLOAT", 16: "BF16", 6: "INT32", 7: "INT64"}


class FakeTensorRT:
    """`trt` and `trtp` are the modules to give away. `refuse`: calls that are to fail, by name. `run`: what plans compute."""

    def __init__(self, run: Run | None = None):
        self.trt, self.trtp = validators.load()
        self.run, self.refuse = run, set()
        self.contexts: list[_Context] = []
        self.plugins: dict[str, validators.Built] = {}
        fake = self
        trt: Any = self.trt
        trt.__version__ = VERSION
        trt.Builder = lambda logger: _Builder(fake, logger)
        trt.OnnxParser = lambda network, logger: _Parser(fake, network)
        trt.Runtime = lambda logger: _Runtime(fake, logger)

    def fails(self, call: str) -> bool:
        return call in self.refuse


class _Tensor:
    def __init__(self, name: str, dtype: Any, shape: tuple[int, ...]):
        self.name, self.dtype, self.shape = name, dtype, shape


class _Network:
    __slots__ = ("inputs", "name", "outputs")

    def __init__(self):
        self.inputs: list[_Tensor] = []
        self.outputs: list[_Tensor] = []

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, index: int) -> _Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> _Tensor:
        return self.outputs[index]


class _ParserError:
    def __init__(self, node: str, what: str):
        self._node, self._what = node, what

    def node_name(self) -> str:
        return self._node

    def node(self) -> int:
        return 0

    def desc(self) -> str:
        return self._what


class _Parser:
    __slots__ = ("_errors", "_fake", "_network")

    def __init__(self, fake: FakeTensorRT, network: _Network):
        self._fake, self._network, self._errors = fake, network, []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> _ParserError:
        return self._errors[index]

    def parse(self, model: bytes) -> bool:
        graph = onnx.load_from_string(model).graph
        trt = self._fake.trt
        if self._fake.fails("parse"):
            self._errors = [_ParserError("node_linear", "no importer for it"), _ParserError("node_add", "nor for this")]
            return False
        known = {value.name: self._tensor(value) for value in (*graph.input, *graph.output, *graph.value_info)}
        for node in graph.node:
            attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            if "plugin_namespace" in attributes:
                plugin_id = f"{attributes['plugin_namespace'].decode()}::{node.op_type}"
                assert attributes["plugin_version"] == b"1" and attributes["aot"] == 1
                inputs = [validators.Input(dtype=known[name].dtype, shape=known[name].shape) for name in node.input]
                layer = validators.Built(trt, plugin_id, inputs, attributes)
                self._fake.plugins[node.name] = layer
                for name, dtype, shape in zip(node.output, layer.output_types, layer.output_shapes, strict=True):
                    known[name] = _Tensor(name, dtype, shape)
        self._network.inputs = [known[value.name] for value in graph.input]
        self._network.outputs = [known[value.name] for value in graph.output]
        return True

    def _tensor(self, value: onnx.ValueInfoProto) -> _Tensor:
        kind = value.type.tensor_type
        shape = tuple(each.dim_value if each.HasField("dim_value") else -1 for each in kind.shape.dim)
        return _Tensor(value.name, getattr(self._fake.trt.DataType, _ONNX.get(kind.elem_type, "BOOL")), shape)


class _Profile:
    __slots__ = ("fake", "shapes")

    def __init__(self, fake: FakeTensorRT):
        self.fake, self.shapes = fake, {}

    def set_shape(self, name: str, least: tuple[int, ...], likely: tuple[int, ...], most: tuple[int, ...]) -> None:
        if self.fake.fails("set_shape"):
            raise ValueError("min/opt/max dimensions are inconsistent")
        assert all(a <= b <= c for a, b, c in zip(least, likely, most, strict=True))
        self.shapes[name] = (least, likely, most)

    def __bool__(self) -> bool:
        return not self.fake.fails("profile")


class _TimingCache:
    def __init__(self, content: bytes):
        self._content = content

    def serialize(self) -> bytes:
        return self._content + b"+"


class _Config:
    __slots__ = ("_cache", "_fake", "cleared", "max_aux_streams", "profiles", "progress_monitor")

    def __init__(self, fake: FakeTensorRT):
        self._fake, self._cache, self.profiles, self.cleared = fake, None, [], []
        self.max_aux_streams = self.progress_monitor = None

    def add_optimization_profile(self, profile: _Profile) -> int:
        if self._fake.fails("add_optimization_profile"):
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def clear_flag(self, flag: Any) -> None:
        self.cleared.append(flag.name)

    def create_timing_cache(self, content: bytes) -> _TimingCache:
        return _TimingCache(content)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        content = cache.serialize()
        if self._fake.fails("set_timing_cache") or content.startswith(b"of another GPU"):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> _TimingCache:
        return self._cache


class _Builder:
    __slots__ = ("_fake", "_logger")

    def __init__(self, fake: FakeTensorRT, logger: Any):
        self._fake, self._logger = fake, logger

    def create_network(self, flags: int) -> _Network | None:
        assert flags == 1 << int(self._fake.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return None if self._fake.fails("create_network") else _Network()

    def create_builder_config(self) -> _Config | None:
        return None if self._fake.fails("create_builder_config") else _Config(self._fake)

    def create_optimization_profile(self) -> _Profile:
        return _Profile(self._fake)

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        assert config.max_aux_streams == 0 and config.cleared == ["TF32"]
        if self._fake.fails("build_serialized_network"):
            self._logger.log(self._fake.trt.ILogger.Severity.WARNING, "a warning")
            self._logger.log(self._fake.trt.ILogger.Severity.ERROR, "[optimizer.cpp] no implementation\n for node X")
            return None
        for tensor in network.inputs:
            for profile in config.profiles:
                assert (-1 in tensor.shape) == (tensor.name in profile.shapes), f"profile and input {tensor.name}"
        if config.progress_monitor is not None:
            config.progress_monitor.phase_start("Building", None, 2)
            config.progress_monitor.phase_start("Timing", "Building", 1)
            assert config.progress_monitor.step_complete("Timing", 0)
            config.progress_monitor.phase_finish("Timing")
            config.progress_monitor.phase_finish("Building")
        tensors = [(each, "INPUT") for each in network.inputs] + [(each, "OUTPUT") for each in network.outputs]
        plan = {
            "name": network.name,
            "tensors": [[each.name, mode, each.dtype.name, list(each.shape)] for each, mode in tensors],
            "profiles": [profile.shapes for profile in config.profiles],
        }
        return json.dumps(plan).encode()


class _Runtime:
    __slots__ = ("_fake", "_logger")

    def __init__(self, fake: FakeTensorRT, logger: Any):
        self._fake, self._logger = fake, logger

    def deserialize_cuda_engine(self, plan: bytes) -> "_Engine | None":
        if self._fake.fails("deserialize_cuda_engine"):
            self._logger.log(self._fake.trt.ILogger.Severity.ERROR, "Version tag does not match")
            return None
        return _Engine(self._fake, json.loads(plan))


class _Engine:
    __slots__ = ("_fake", "dtypes", "modes", "name", "profiles", "shapes")

    def __init__(self, fake: FakeTensorRT, plan: dict[str, Any]):
        self._fake, self.name, self.profiles = fake, plan["name"], plan["profiles"]
        self.modes = {name: mode for name, mode, _, _ in plan["tensors"]}
        self.dtypes = {name: dtype for name, _, dtype, _ in plan["tensors"]}
        self.shapes = {name: tuple(shape) for name, _, _, shape in plan["tensors"]}

    num_io_tensors = property(lambda self: len(self.shapes))
    num_optimization_profiles = property(lambda self: len(self.profiles))
    device_memory_size_v2 = property(lambda self: 4096)

    def get_tensor_name(self, index: int) -> str:
        return list(self.shapes)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self._fake.trt.DataType, self.dtypes[name])

    def create_execution_context(self, strategy: Any) -> "_Context | None":
        assert strategy.name == "USER_MANAGED"
        if self._fake.fails("create_execution_context"):
            return None
        self._fake.contexts.append(_Context(self._fake, self))
        return self._fake.contexts[-1]


class _Context:
    """Refuses to run before memory, profile, every shape and every address are there."""

    __slots__ = ("_addresses", "_engine", "_fake", "_has_memory", "_profile", "shapes")

    def __init__(self, fake: FakeTensorRT, engine: _Engine):
        self._fake, self._engine, self._has_memory, self._profile = fake, engine, False, None
        self._addresses: dict[str, int] = {}
        self.shapes = {name: shape for name, shape in engine.shapes.items() if engine.modes[name] == "INPUT"}

    def set_device_memory(self, address: int, size: int) -> None:
        assert address and size >= self._engine.device_memory_size_v2
        self._has_memory = True

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._profile = self._engine.profiles[index]
        return not self._fake.fails("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._profile[name]
        self.shapes[name] = shape
        fits = all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))
        return fits and not self._fake.fails("set_input_shape")

    def infer_shapes(self) -> list[str]:
        return ["kv_pages.0"] if self._fake.fails("infer_shapes") else [n for n, shape in self.shapes.items() if -1 in shape]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """TensorRT infers it; here the first varying size of an output is that of the input which decides it."""
        (first, *_), rest = next(shape for shape in self.shapes.values() if shape != ()), self._engine.shapes[name][1:]
        return (first + self._fake.fails("get_tensor_shape"), *rest)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self._engine.shapes and address % 16 == 0
        self._addresses[name] = address
        return not self._fake.fails("set_tensor_address")

    def execute_async_v3(self, stream: int) -> bool:
        assert self._has_memory and self._profile is not None
        assert set(self._addresses) == set(self._engine.shapes), "an address is missing"
        if self._fake.fails("execute_async_v3"):
            return False
        inputs = {name: self._at(name, shape) for name, shape in self.shapes.items()}
        outputs = [name for name, mode in self._engine.modes.items() if mode == "OUTPUT"]
        for name, value in zip(outputs, self._fake.run(self._engine.name, inputs), strict=True):
            assert value.dtype == _TORCH[self._engine.dtypes[name]]
            self._at(name, tuple(value.shape)).copy_(value)
        return True

    def _at(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        dtype = _TORCH[self._engine.dtypes[name]]
        count = torch.Size(shape).numel()
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(self._addresses[name])
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
