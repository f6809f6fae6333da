"""One launch of a Triton-language kernel, described once: run by PyTorch or the interpreter, compiled ahead of time.

A description needs only the tensors' shapes and dtypes; made of meta tensors it can be compiled for a device that is not
here, which is how the sm_90 check and a TensorRT plugin use it.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

Wrap = Callable[[object], object]
"""Makes a kernel callable where it is launched: `unwrapped`, or `torch.library.wrap_triton` where PyTorch traces."""

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


HOPPER_CAPABILITY = (9, 0)
"""The compute capability of the H100 and the H200. Kernels in Gluon are for it: their instructions are not on other devices."""

HOPPER_MULTIPROCESSORS = 132

HOPPER_SHARED_BYTES = 227 * 1024
"""Shared memory that one program may have there; on an A100 163 KB, on GPUs of compute capability 8.6, 8.9 and 12.0 99 KB."""


_only_compiled: ContextVar[bool] = ContextVar("only_compiled", default=False)


def unwrapped(kernel: object) -> object:
    return kernel


@contextmanager
def only_compiled() -> Iterator[None]:
    """Launches of this thread within the block are compiled and not launched; their outputs are zeros. As many are compiled at
    once as there are cores, and all are ready when the block has ended.

    One after the other, as they are launched, the kernels of a denoising step of the 26B model take 36 s (H200, Triton 3.6).
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads, triton.AsyncCompileMode(threads):
        before = _only_compiled.set(True)
        try:
            yield
        finally:
            _only_compiled.reset(before)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel with its arguments in the order in which it takes them: inputs, int32 scalars, outputs, constants.

    `grid` counts programs, the fast axis first. `outputs` are uninitialised until `run`.
    """

    kernel: object
    grid: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    scalars: tuple[int, ...]
    outputs: tuple[Tensor, ...]
    constants: dict[str, int]
    num_warps: int
    num_stages: int

    def run(self, wrap: Wrap = unwrapped) -> tuple[Tensor, ...]:
        """Launches on the current stream, without waiting for it, and returns `outputs`. See `only_compiled`."""
        arguments = (*self.inputs, *self.scalars, *self.outputs)
        options = {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}
        if _only_compiled.get():
            self.kernel.warmup(*arguments, grid=self.grid, **options)
            for each in self.outputs:
                each.zero_()
        else:
            wrap(self.kernel)[self.grid](*arguments, **options)
        return self.outputs

    def signature(self) -> dict[str, str]:
        """The type of every argument of the compiled kernel, by its name in the source.

        Raises:
            ValueError: the kernel's source does not take these arguments in this order.
        """
        types = [POINTERS[tensor.dtype] for tensor in self.inputs]
        types += ["i32"] * len(self.scalars)
        types += [POINTERS[tensor.dtype] for tensor in self.outputs]
        names, constants = self.kernel.arg_names[: len(types)], self.kernel.arg_names[len(types) :]
        if constants != list(self.constants):
            raise ValueError(
                f"kernel {self.kernel.__name__}: after {len(types)} inputs, scalars and outputs come the arguments "
                f"{constants}, but the launch declares the constants {list(self.constants)}; make the two agree"
            )
        return dict(zip(names, types, strict=True))

    def compile(self, target: GPUTarget) -> CompiledKernel:
        """Compiles ahead of time; the device need not be here.

        Every tensor is taken to start at a multiple of 16 bytes, as allocators and TensorRT give them: the kernels' wide
        loads depend on it.
        """
        signature = self.signature()
        aligned = [["tt.divisibility", 16]]
        kind = GluonASTSource if self.kernel.is_gluon() else ASTSource
        source = kind(
            self.kernel,
            signature | dict.fromkeys(self.constants, "constexpr"),
            constexprs=self.constants,
            attrs={(place,): aligned for place, kind in enumerate(signature.values()) if kind.startswith("*")},
        )
        return triton.compile(source, target=target, options={"num_warps": self.num_warps, "num_stages": self.num_stages})


def least(number: int | torch.SymInt) -> int:
    """The largest power of two, up to 2^20, that a number, symbolic or not, is known to reach; 1 where nothing is known."""
    if isinstance(number, int):
        return 1 << min(max(number, 1).bit_length() - 1, 20)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # only where PyTorch traces: it imports sympy

    bound = 1
    while bound < 1 << 20 and statically_known_true(number >= 2 * bound):
        bound *= 2
    return bound


def ceil_div(dividend: int, divisor: int) -> int:
    """`triton.cdiv`, also for the symbolic numbers of a trace."""
    return (dividend + divisor - 1) // divisor


def multiprocessors(tensor: Tensor) -> int:
    """Of the tensor's GPU; of an H100 or H200, if it is on none that is here."""
    if not tensor.is_cuda or not torch.cuda.is_available():
        return HOPPER_MULTIPROCESSORS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def shared_bytes(tensor: Tensor) -> int:
    """Shared memory that one program may have on the tensor's GPU; Hopper's, if it is on none that is here."""
    if not tensor.is_cuda or not torch.cuda.is_available():
        return HOPPER_SHARED_BYTES
    return torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin
