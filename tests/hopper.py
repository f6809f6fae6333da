"""Compiles a described launch for Hopper on a machine without a GPU, and checks what came of it."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from triton.backends.compiler import GPUTarget  # noqa: E402

from plugins.triton_launch import Launch  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
MAX_SHARED_BYTES = 227 * 1024  # of one thread block, CUDA C++ programming guide, compute capability 9.0
MAX_REGISTERS = 255  # of one thread, by the same guide
PTX_TYPES = {"u64": "pointer", "u32": "i32"}
INSTRUCTIONS = ("wgmma.mma_async", "mma.sync", "cp.async.cg", "ld.global.v4")


class HopperDriver:
    """As much of a driver as a compiler's tracing asks for."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER


def check_compiles(launch: Launch, directory: Path, title: str) -> dict[str, int]:
    """Compiles, prints what it uses, checks that it can run as declared. Returns counts of the PTX's instructions."""
    compiled = launch.compile(HOPPER)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    (directory / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    used = resources(directory / "kernel.cubin")
    instructions = {each: count for each in INSTRUCTIONS if (count := ptx.count(each))}
    print(f"\n{title}: {launch.kernel.__name__}, {used}, shared {metadata.shared} bytes, {instructions}")

    assert used["STACK"] == used["LOCAL"] == 0, "registers spilled"
    assert used["REG"] <= MAX_REGISTERS
    assert metadata.shared <= MAX_SHARED_BYTES
    assert metadata.num_warps == launch.num_warps
    assert metadata.num_ctas == 1
    # The two arguments that Triton appends, scratch for the kernel and for its profiler, must be of no use.
    assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
    declared = ["i32" if kind == "i32" else "pointer" for kind in launch.signature().values()]
    entry = re.search(r"\.entry[^)]*\)", ptx).group()
    assert [PTX_TYPES[kind] for kind in re.findall(r"\.param \.(\w+)", entry)] == [*declared, "pointer", "pointer"]
    return instructions


def resources(path: Path) -> dict[str, int]:
    """Of a cubin. REG: registers a thread. STACK: bytes of its stack frame, where registers are spilled. LOCAL: its other
    memory."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    printed = subprocess.run([cuobjdump, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}
