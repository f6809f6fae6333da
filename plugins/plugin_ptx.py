"""A kernel's PTX in the form that an ahead-of-time TensorRT plugin embeds.

TensorRT passes a kernel the tensors and scalars that the plugin declares, nothing else. Triton declares two more pointers
behind them, scratch for the kernel and for its profiler: they are taken out of the signature here, which is possible where
the kernel does not read them. The entry gets a name of its own for each variant, and debug information is left out, so that a
plan neither confuses two variants of a kernel nor names files of the machine that built it.
"""

import functools
import hashlib
import re
from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from plugins.triton_launch import HOPPER_SHARED_BYTES, Launch

HOPPER = GPUTarget("cuda", 90, 32)
"""H100 and H200: what the kernels are tuned for."""

_HIDDEN = 2
_ENTRY = re.compile(r"(?P<head>\.visible \.entry (?P<name>\w+)\()(?P<parameters>[^)]*)\)")
_DEBUG_LINES = re.compile(r"^\s*\.(loc|file)\s.*\n", re.MULTILINE)
_DEBUG_SECTIONS = re.compile(r"^\s*\.section\s+\.debug_.*", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class PluginKernel:
    """A compiled kernel. `num_threads`: of a block. `shared_bytes`: dynamic shared memory of a block."""

    name: str
    ptx: str
    num_threads: int
    shared_bytes: int


def compile_for_plugin(launch: Launch, target: GPUTarget = HOPPER) -> PluginKernel:
    """Compiles the launch's kernel; once for each combination of kernel, argument types, constants and tile.

    Raises:
        ValueError: the kernel needs scratch memory, several blocks working together, or more shared memory than there is.
    """
    key = (launch.kernel, tuple(launch.signature().items()), tuple(launch.constants.items()))
    return _compile(_Hashable(key, launch), launch.num_warps, launch.num_stages, target)


class _Hashable:
    """A launch that equals another with the same key: what varies with shapes does not matter to the compiler."""

    def __init__(self, key: tuple, launch: Launch):
        self.key, self.launch = key, launch

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and self.key == other.key


@functools.cache
def _compile(described: _Hashable, num_warps: int, num_stages: int, target: GPUTarget) -> PluginKernel:
    launch = described.launch
    compiled = launch.compile(target)
    metadata, kernel = compiled.metadata, launch.kernel.__name__
    scratch = {"scratch": metadata.global_scratch_size, "profiler scratch": metadata.profile_scratch_size}
    for what, size in scratch.items():
        if size:
            raise ValueError(f"kernel {kernel}: needs {size} bytes of {what}, expected 0; a TensorRT plugin cannot give it")
    if metadata.num_ctas != 1:
        raise ValueError(
            f"kernel {kernel}: got num_ctas {metadata.num_ctas}, expected 1; a TensorRT plugin launches no clusters"
        )
    if metadata.shared > HOPPER_SHARED_BYTES:
        raise ValueError(
            f"kernel {kernel}: needs {metadata.shared} bytes of shared memory, expected at most {HOPPER_SHARED_BYTES}"
        )
    variant = hashlib.sha256(repr((described.key[1:], num_warps, num_stages, target)).encode()).hexdigest()[:8]
    name = f"{metadata.name}_{variant}"
    return PluginKernel(
        name=name,
        ptx=plugin_ptx(compiled.asm["ptx"], metadata.name, name, len(launch.signature())),
        num_threads=32 * metadata.num_warps,
        shared_bytes=metadata.shared,
    )


def plugin_ptx(ptx: str, kernel: str, name: str, num_arguments: int) -> str:
    """`ptx` with the entry `kernel` renamed to `name`, taking exactly `num_arguments` arguments, without debug information.

    Raises:
        ValueError: the kernel takes other hidden arguments than expected, or reads one.
    """
    entry = _ENTRY.search(ptx)
    if entry is None or entry["name"] != kernel or len(_ENTRY.findall(ptx)) != 1:
        raise ValueError(f"kernel {kernel}: expected PTX with one entry of this name")
    parameters = entry["parameters"].split(",")
    hidden = parameters[num_arguments:]
    if len(hidden) != _HIDDEN or not all(".u64" in each for each in hidden):
        raise ValueError(
            f"kernel {kernel}: takes {len(parameters)} arguments, expected {num_arguments} and {_HIDDEN} pointers to scratch; "
            "this version of triton is not the one that was checked"
        )
    body = ptx[entry.end() :]
    for place in range(num_arguments, len(parameters)):
        if re.search(rf"\b{kernel}_param_{place}\b", body):
            raise ValueError(f"kernel {kernel}: reads its hidden argument {place}, which TensorRT does not pass")
    kept = entry["head"] + ",".join(parameters[:num_arguments]) + "\n)"
    stripped = _DEBUG_SECTIONS.sub("", _DEBUG_LINES.sub("", ptx[: entry.start()] + kept + body))
    stripped = re.sub(r"^(\.target \w+), debug$", r"\1", stripped, flags=re.MULTILINE)
    return re.sub(rf"\b{kernel}\b", name, re.sub(rf"\b{kernel}_param_", f"{name}_param_", stripped))
