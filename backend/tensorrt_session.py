"""The programs of a TensorRT engine: plans, made callable like the programs of any other target.

One execution context a shape, kept: a context whose shapes change loads the plugins' kernels again each time (and TensorRT
11.1 and 11.2 never unload them), and a captured CUDA graph needs a context whose shapes stay. So that there are few shapes,
inputs are filled up: tokens, sequences, page-table columns and rows of images to the next power of two that a profile takes,
the soft tokens of an image to the next of the profiles. What is filled up belongs to no sequence, and is cut off the outputs.

All contexts share one workspace: a session has one owner, and its programs run one after the other on the current stream.
TensorRT reports failure by returning False or None; here each becomes an error that names the program and the binding.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contract.manifest import Binding, Manifest, ManifestError, Program
from plugins.tensorrt_log import collecting_logger

RunProgram = Callable[[list[Tensor]], Sequence[Tensor]]

_LEAST_FILLED = {"tokens": 16, "sequences": 1, "columns": 64, "images": 1, "soft_tokens": 1}
"""Sizes that are filled up, and from where: below it, shapes would be many and the gain small."""

_DTYPES = {"float32": "FLOAT", "bfloat16": "BF16", "int32": "INT32"}
_ALIGNMENT = 16
"""Bytes. The kernels' wide loads depend on it."""


class PlanError(RuntimeError):
    """A plan that did not run: one line that names the program and the binding."""


def load_plans(manifest: Manifest, engine_dir: Path, trt: ModuleType | None = None) -> dict[str, RunProgram]:
    """The programs of an engine directory, on the engine's device.

    trt: the package `tensorrt`, where it is not to be imported.

    Raises:
        ManifestError: TensorRT is missing or of another version, or a plan is not the one that the manifest describes.
    """
    trt = trt or _import_tensorrt(engine_dir)
    built_with = manifest.tools.get("tensorrt")
    if built_with != trt.__version__:
        raise ManifestError(
            f"{engine_dir}: built with TensorRT {built_with}, here is {trt.__version__}; plans run only in their own version: "
            f"pip install tensorrt=={built_with}, or build the engine again"
        )
    logger = collecting_logger(trt)
    runtime = trt.Runtime(logger)
    engines = {}
    for name, program in manifest.programs.items():
        engines[name] = runtime.deserialize_cuda_engine((engine_dir / program.file).read_bytes())
        if engines[name] is None:
            raise ManifestError("; ".join([f"{engine_dir / program.file}: TensorRT cannot load the plan", *logger.errors]))
        _check_plan(trt, engines[name], program, f"{engine_dir / program.file}")
    device = torch.device(manifest.build.device)
    workspace = torch.empty(max(engine.device_memory_size_v2 for engine in engines.values()), dtype=torch.uint8, device=device)
    shapes = {name: weight.shape for name, weight in manifest.weights.items()}
    return {
        name: Plan(trt, engines[name], name, program, _bindings(program, shapes, manifest), workspace, logger)
        for name, program in manifest.programs.items()
    }


class Plan:
    """One plan. Call it with the tensors of the program's inputs, then of its weights, in the manifest's order.

    Tensors are on the engine's device. Weights and KV pages are contiguous and start at a multiple of 16 bytes; others are
    copied where they do not. Outputs are new tensors; the call does not wait for the device.
    """

    def __init__(
        self,
        trt: ModuleType,
        engine: Any,
        name: str,
        program: Program,
        bindings: tuple[Binding, ...],
        workspace: Tensor,
        logger: Any,
    ):
        self._trt, self._engine, self._name, self._program, self._logger = trt, engine, name, program, logger
        self._bindings, self._workspace = bindings, workspace
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        self._used = [binding.name in names for binding in bindings]  # a plan leaves out what it does not read
        self._contexts: dict[tuple[tuple[str, int], ...], _Context] = {}
        self._weights: dict[str, int] = {}  # binding → address

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """
        1. Read the sizes. 2. Fill up to sizes that a profile takes. 3. Find or make the context of these sizes.
        4. Give it every address and enqueue. 5. Cut the outputs.

        Raises:
            PlanError: a tensor is not what its binding says, no profile takes it, or TensorRT does not run.
        """
        # 1.
        sizes: dict[str, int] = {}
        for binding, tensor in zip(self._bindings, tensors, strict=True):
            if self._weights.get(binding.name) != tensor.data_ptr():  # weights stay where they are: they are looked at once
                self._read_sizes(binding, tensor, sizes)
                if binding.name in self._program.weights:
                    self._weights[binding.name] = tensor.data_ptr()
        # 2.
        profile, filled = self._fill(sizes)
        # 3.
        key = tuple(sorted(filled.items()))
        context = self._contexts.get(key)
        if context is None:
            context = self._contexts[key] = self._make_context(profile, filled)
        # 4.
        inputs = [
            (binding.name, _filled_up(tensor, binding, filled))
            for binding, tensor, used in zip(self._bindings, tensors, self._used, strict=True)
            if used
        ]
        outputs = [
            torch.empty(shape_of(binding, filled), dtype=getattr(torch, binding.dtype), device=self._workspace.device)
            for binding in self._program.outputs
        ]
        addressed = [*inputs, *((binding.name, each) for binding, each in zip(self._program.outputs, outputs, strict=True))]
        for name, tensor in addressed:
            address = tensor.data_ptr()
            if context.addresses.get(name) != address:
                self._check(context.execution.set_tensor_address(name, address), f"binding '{name}': address refused")
                context.addresses[name] = address
        self._check(context.execution.execute_async_v3(self._stream()), "TensorRT did not enqueue it")
        # 5.
        return [_cut(output, binding, sizes) for output, binding in zip(outputs, self._program.outputs, strict=True)]

    def _read_sizes(self, binding: Binding, tensor: Tensor, sizes: dict[str, int]) -> None:
        where = f"program {self._name}, binding '{binding.name}'"
        expected = getattr(torch, binding.dtype)
        if tensor.dtype != expected:
            raise PlanError(f"{where}: got {tensor.dtype}, expected {expected}")
        if tensor.device.type != self._workspace.device.type:
            raise PlanError(f"{where}: got a tensor on {tensor.device}, expected {self._workspace.device}")
        if not _is_plain(tensor) and (binding.name in self._program.weights or _holds_pages(binding)):
            raise PlanError(
                f"{where}: expected a contiguous tensor that starts at a multiple of {_ALIGNMENT} bytes "
                "(it is too large to copy)"
            )
        fits = tensor.ndim == len(binding.shape)
        for got, wanted in zip(tensor.shape, binding.shape, strict=False):
            fits = fits and got == (sizes.setdefault(wanted, got) if isinstance(wanted, str) else wanted)
        if not fits:
            known = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in binding.shape)
            raise PlanError(f"{where}: got shape {tuple(tensor.shape)}, expected {known}")

    def _fill(self, sizes: Mapping[str, int]) -> tuple[int, dict[str, int]]:
        """The first profile that takes the sizes filled up, and these."""
        for index, profile in enumerate(self._program.profiles):
            filled = {name: _fill_size(name, size, profile.sizes[name]) for name, size in sizes.items()}
            if "starts" in filled:
                filled["starts"] = filled["sequences"] + 1
            ranges = profile.sizes
            if all(sizes[name] <= size and ranges[name][0] <= size <= ranges[name][2] for name, size in filled.items()):
                return index, filled
        got = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise PlanError(
            f"program {self._name}: no profile takes {got}; the plan has {'; '.join(map(str, self._program.profiles))}; "
            "build the engine with larger limits, or serve it with fewer sequences or cached tokens"
        )

    def _make_context(self, profile: int, sizes: Mapping[str, int]) -> "_Context":
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise PlanError("; ".join([f"program {self._name}: TensorRT made no execution context", *self._logger.errors]))
        context.set_device_memory(self._workspace.data_ptr(), self._workspace.nbytes)
        title = str(self._program.profiles[profile])
        self._check(context.set_optimization_profile_async(profile, self._stream()), f"profile '{title}' refused")
        for binding, used in zip(self._bindings, self._used, strict=True):
            if used and any(isinstance(size, str) for size in binding.shape):
                shape = shape_of(binding, sizes)
                accepted = context.set_input_shape(binding.name, shape)
                self._check(accepted, f"profile '{title}', binding '{binding.name}': shape {shape} refused")
        missing = context.infer_shapes()
        if missing:
            raise PlanError(f"program {self._name}: TensorRT misses the shape or address of {', '.join(missing)}")
        for binding in self._program.outputs:
            got, expected = tuple(context.get_tensor_shape(binding.name)), shape_of(binding, sizes)
            if got != expected:
                raise PlanError(
                    f"program {self._name}, binding '{binding.name}': TensorRT gives shape {got}, expected {expected}"
                )
        return _Context(execution=context, addresses={})

    def _stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self._workspace.is_cuda else 0

    def _check(self, succeeded: bool, what: str) -> None:
        if not succeeded:
            raise PlanError("; ".join([f"program {self._name}: {what}", *self._logger.errors]))


@dataclass(frozen=True, kw_only=True)
class _Context:
    """An execution context whose shapes are set, and the addresses that it has, by binding."""

    execution: Any
    addresses: dict[str, int]


def shape_of(binding: Binding, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[size] if isinstance(size, str) else size for size in binding.shape)


def _fill_size(name: str, size: int, limits: tuple[int, int, int]) -> int:
    if name not in _LEAST_FILLED:
        return size
    least, _, most = limits
    power = 1 << (max(size, _LEAST_FILLED[name]) - 1).bit_length()
    return max(least, min(power, most))


def _filled_up(tensor: Tensor, binding: Binding, sizes: Mapping[str, int]) -> Tensor:
    """The tensor with zeros behind it, or for starts, which ascend, its last value: sequences without tokens."""
    shape = shape_of(binding, sizes)
    if tuple(tensor.shape) == shape:
        return tensor if _is_plain(tensor) else tensor.clone(memory_format=torch.contiguous_format)
    if binding.shape == ("starts",):
        return torch.cat([tensor, tensor[-1:].expand(shape[0] - tensor.shape[0])])
    filled = tensor.new_zeros(shape)
    filled[tuple(slice(size) for size in tensor.shape)] = tensor
    return filled


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0


def _holds_pages(binding: Binding) -> bool:
    return any(isinstance(size, str) and size.endswith(".pages") for size in binding.shape)


def _cut(output: Tensor, binding: Binding, sizes: Mapping[str, int]) -> Tensor:
    shape = shape_of(binding, sizes)
    return output if tuple(output.shape) == shape else output[tuple(slice(size) for size in shape)]


def _bindings(program: Program, shapes: Mapping[str, tuple[int, ...]], manifest: Manifest) -> tuple[Binding, ...]:
    """All that the program is called with, in order."""
    weights = (Binding(name=name, dtype=manifest.weights[name].dtype, shape=shapes[name]) for name in program.weights)
    return (*program.inputs, *weights)


def _check_plan(trt: ModuleType, engine: Any, program: Program, where: str) -> None:
    """Compares a plan's tensors with the manifest's bindings."""
    remedy = "build the engine again with --force"
    bindings = {binding.name: binding for binding in (*program.inputs, *program.outputs)}
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    for name in names:
        if name not in bindings and name not in program.weights:
            raise ManifestError(f"{where}: has a binding '{name}' that the manifest does not know; {remedy}")
    for binding in program.outputs:
        if binding.name not in names:
            raise ManifestError(f"{where}: binding '{binding.name}' is missing; {remedy}")
    for name in set(names) & set(bindings):
        got, expected = engine.get_tensor_dtype(name), getattr(trt.DataType, _DTYPES[bindings[name].dtype])
        if got != expected:
            raise ManifestError(f"{where}: binding '{name}' is {got}, expected {expected}; {remedy}")
    if engine.num_optimization_profiles != len(program.profiles):
        raise ManifestError(
            f"{where}: has {engine.num_optimization_profiles} profiles, the manifest {len(program.profiles)}; {remedy}"
        )


def _import_tensorrt(engine_dir: Path) -> ModuleType:
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise ManifestError(
            f"{engine_dir}: built for TensorRT, which does not import here ({error}); pip install '.[tensorrt]'"
        ) from None
