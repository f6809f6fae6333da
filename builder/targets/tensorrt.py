"""The `tensorrt` target: one plan a program, built from its ONNX graph with our kernels as plugins inside.

1. Translate the program to ONNX, lower it to plugins, compile their kernels. 2. Parse it into a strongly typed network and
compare that with the program's bindings. 3. Add the optimization profiles. 4. Build, with a timing cache and a progress bar.

TensorRT reports failure by returning False or None and writing to a log; here each becomes a `BuildError` that says where.
The module is a parameter, so that the same code runs over TensorRT-RTX, which has the same interface.
"""

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import torch
from rich.console import Console

from builder.errors import BuildError
from builder.export import TracedProgram
from builder.onnx_export import to_onnx
from builder.staging import writing
from builder.targets.compiled import Compiled
from builder.targets.tensorrt_lowering import PLUGINS, compile_kernels, drop_unused_inputs, lower_to_plugins
from builder.targets.tensorrt_profiles import choose_profiles
from builder.targets.tensorrt_progress import progress_monitor
from contract.manifest import Binding, BuildConfig, Profile
from contract.model_config import ModelConfig
from plugins.moe.launch import Tile, choose_tile
from plugins.tensorrt_log import collecting_logger
from plugins.tensorrt_plugin import register

_DTYPES = {"float32": "FLOAT", "bfloat16": "BF16", "int32": "INT32", "int64": "INT64"}
"""Our name of a dtype → the name in `tensorrt.DataType`."""


class PlanBuilder:
    """Builds the plans of one engine. `configure` may change TensorRT's builder configuration at last."""

    def __init__(
        self,
        trt: ModuleType,
        model: ModelConfig,
        build: BuildConfig,
        *,
        trtp: ModuleType | None = None,
        timing_cache: Path | None = None,
        console: Console | None = None,
        configure: Callable[[Any], None] = lambda config: None,
    ):
        """trt: tensorrt, or tensorrt_rtx. trtp: tensorrt.plugin, for programs that have plugins. timing_cache: a file; it is
        made where it is missing. console: where the progress bar goes; None for none."""
        self._trt, self._trtp, self._model, self._build = trt, trtp, model, build
        self._timing_cache, self._console, self._configure = timing_cache, console, configure

    def compile_program(self, program: TracedProgram, directory: Path) -> Compiled:
        """Writes `<name>.plan`.

        Raises:
            BuildError: see the module's docstring.
        """
        # 1.
        model = drop_unused_inputs(
            lower_to_plugins(
                to_onnx(program),
                num_experts=self._model.num_experts,
                top_k=self._model.top_k_experts,
                tile=self._tile(program),
            )
        )
        if compile_kernels(model):
            if self._trtp is None:
                raise BuildError(f"program {program.name}: has plugins, and {self._trt.__name__} has no ahead-of-time plugins")
            register(PLUGINS, self._trt, self._trtp)
        profiles = choose_profiles(program, self._model, self._build)
        plan = self.build(program, model, profiles)
        name = f"{program.name}.plan"
        with writing(directory / name):
            (directory / name).write_bytes(plan)
        return Compiled(file=name, profiles=profiles)

    def build(self, program: TracedProgram, model: onnx.ModelProto, profiles: tuple[Profile, ...]) -> bytes:
        """The plan of `model`, which has the program's bindings."""
        trt, where = self._trt, f"program {program.name}"
        logger = collecting_logger(trt)

        def refuse(what: str) -> BuildError:
            return BuildError("; ".join([f"{where}: {what}", *logger.errors]))

        builder = trt.Builder(logger)
        # 2.
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        if network is None:
            raise refuse("TensorRT made no network")
        network.name = program.name
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(model.SerializeToString()):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            lines = [f"{where}, node {error.node_name() or error.node()}: {error.desc()}" for error in errors]
            raise BuildError("\n".join(lines) or f"{where}: TensorRT cannot parse it and says nothing of why")
        inputs = _check_network(trt, network, program, where)
        # 3.
        config = builder.create_builder_config()
        if config is None:
            raise refuse("TensorRT made no builder configuration")
        for index, profile in enumerate(profiles):
            added = _optimization_profile(builder, profile, inputs, where)
            if config.add_optimization_profile(added) != index:
                raise refuse(f"profile '{profile.name}' is not one that TensorRT accepts ({profile})")
        config.max_aux_streams = 0  # a plan that is captured in a CUDA graph must stay on one stream
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
        # 4.
        with ExitStack() as stack:
            if self._console is not None:
                config.progress_monitor = progress_monitor(trt, self._console, program.name, stack)
            cache = self._load_timing_cache(config, refuse)
            self._configure(config)
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise refuse("TensorRT built no plan")
        self._save_timing_cache(config, cache)
        return bytes(plan)

    def _tile(self, program: TracedProgram) -> Tile:
        """Of the experts' products. It is fixed in the plan: encode is made fast for its longest chunk, denoise for one
        canvas, where a step is bound by the experts' weights and a finer tile wastes less."""
        rows = self._build.max_encode_tokens if program.name == "encode" else self._model.canvas_length
        return choose_tile(rows, self._model.top_k_experts, self._model.num_experts, getattr(torch, self._build.dtype))

    def _load_timing_cache(self, config: Any, refuse: Callable[[str], BuildError]) -> Any:
        if self._timing_cache is None:
            return None
        try:
            saved = self._timing_cache.read_bytes() if self._timing_cache.exists() else b""
        except OSError as error:
            raise BuildError(f"{self._timing_cache}: cannot be read ({error}); name another with --timing-cache") from error
        cache = config.create_timing_cache(saved)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            # Another GPU's or another TensorRT's: measure anew, and replace it.
            cache = config.create_timing_cache(b"")
            if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
                raise refuse("TensorRT accepts no timing cache")
        return cache

    def _save_timing_cache(self, config: Any, cache: Any) -> None:
        """In one rename: another build may be reading it."""
        if cache is None:
            return
        with writing(self._timing_cache):
            file, name = tempfile.mkstemp(prefix=f".{self._timing_cache.name}.", dir=self._timing_cache.parent)
            with os.fdopen(file, "wb") as opened:
                opened.write(bytes(config.get_timing_cache().serialize()))
            os.replace(name, self._timing_cache)


def _check_network(trt: ModuleType, network: Any, program: TracedProgram, where: str) -> dict[str, Binding]:
    """The bindings of the network's inputs that vary in size, by name, after comparing all with the program's."""
    bindings = {binding.name: binding for binding in program.inputs}
    varying = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name in bindings:
            _check_tensor(trt, tensor, bindings[tensor.name], where)
            if any(isinstance(size, str) for size in bindings[tensor.name].shape):
                varying[tensor.name] = bindings[tensor.name]
        elif tensor.name not in program.weights:
            raise BuildError(f"{where}: TensorRT found an input '{tensor.name}' that is none of its bindings")
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    expected = [binding.name for binding in program.outputs]
    if [tensor.name for tensor in outputs] != expected:
        raise BuildError(f"{where}: got outputs {[tensor.name for tensor in outputs]}, expected {expected}")
    for tensor, binding in zip(outputs, program.outputs, strict=True):
        _check_tensor(trt, tensor, binding, where)
    return varying


def _check_tensor(trt: ModuleType, tensor: Any, binding: Binding, where: str) -> None:
    expected = getattr(trt.DataType, _DTYPES[binding.dtype])
    if tensor.dtype != expected:
        raise BuildError(f"{where}, binding '{binding.name}': got {tensor.dtype}, expected {expected}")
    shape = tuple(tensor.shape)
    fixed = tuple(size if isinstance(size, int) else -1 for size in binding.shape)
    # TensorRT may not know that a size of an output is fixed.
    fits = len(shape) == len(fixed) and all(size in (-1, wanted) for size, wanted in zip(shape, fixed, strict=True))
    if not fits:
        raise BuildError(f"{where}, binding '{binding.name}': got shape {shape}, expected {fixed}")


def _optimization_profile(builder: Any, profile: Profile, inputs: dict[str, Binding], where: str) -> Any:
    made = builder.create_optimization_profile()
    for name, binding in inputs.items():
        shapes = profile.shapes(binding)
        try:
            made.set_shape(name, *shapes)
        except (RuntimeError, ValueError) as error:
            raise BuildError(f"{where}, profile '{profile.name}', binding '{name}': {shapes} refused: {error}") from None
    if not made:
        raise BuildError(f"{where}, profile '{profile.name}': TensorRT finds it incomplete ({profile})")
    return made
