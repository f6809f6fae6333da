"""Every kernel of the mixture of experts compiles for Hopper at the real model's shapes, on a machine without a GPU.

Run with `-s` to see registers, shared memory and instructions of each.
"""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from triton.backends.compiler import GPUTarget  # noqa: E402

from plugins.moe import launch  # noqa: E402
from plugins.triton_launch import Launch  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
MAX_SHARED_BYTES = 227 * 1024  # of one thread block, CUDA C++ programming guide, compute capability 9.0
MAX_REGISTERS = 255
HIDDEN, WIDTH, EXPERTS, TOP_K = 2816, 704, 128, 8
PTX_TYPES = {"u64": "pointer", "u32": "i32"}
PIPELINE = ["router", "align", "gate_up", "down", "combine"]


def launches(rows: int, dtype: torch.dtype) -> dict[str, Launch]:
    """The whole pipeline on meta tensors, each kernel's outputs the next one's inputs."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tile = launch.choose_tile(rows, TOP_K, EXPERTS, dtype)
    router = launch.router(tensor(rows, EXPERTS), tensor(EXPERTS), TOP_K)
    top_k_weights, top_k_index = router.outputs
    align = launch.align(top_k_index, EXPERTS, tile.rows)
    gate_up = launch.gate_up(tensor(rows, HIDDEN), tensor(EXPERTS, 2 * WIDTH, HIDDEN), *align.outputs, TOP_K, tile)
    down = launch.down(*gate_up.outputs, tensor(EXPERTS, HIDDEN, WIDTH), top_k_weights, *align.outputs, tile)
    combine = launch.combine(*down.outputs, TOP_K)
    assert combine.outputs[0].shape == (rows, HIDDEN)
    return dict(zip(PIPELINE, (router, align, gate_up, down, combine), strict=True))


def resources(cubin: bytes, path: Path) -> dict[str, int]:
    """REG: registers a thread. STACK: bytes of its stack frame, where registers are spilled. LOCAL: its other memory."""
    path.write_bytes(cubin)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    printed = subprocess.run([cuobjdump, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}


@pytest.mark.parametrize("name", PIPELINE)
@pytest.mark.parametrize(
    ("rows", "dtype"), [(256, torch.bfloat16), (16384, torch.bfloat16), (256, torch.float32)], ids=lambda each: str(each)
)
def test_compiles(rows, dtype, name, tmp_path):
    described = launches(rows, dtype)[name]
    compiled = described.compile(HOPPER)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    used = resources(compiled.asm["cubin"], tmp_path / "kernel.cubin")
    instructions = {each: ptx.count(each) for each in ("wgmma.mma_async", "mma.sync", "cp.async.cg")}
    print(f"\n{name}, {rows} rows, {dtype}: {used}, shared {metadata.shared} bytes, {instructions}")

    assert used["STACK"] == used["LOCAL"] == 0, "registers spilled"
    assert used["REG"] <= MAX_REGISTERS
    assert metadata.shared <= MAX_SHARED_BYTES
    assert metadata.num_warps == described.num_warps
    assert metadata.num_ctas == 1
    # The two arguments that Triton appends, scratch for the kernel and for its profiler, must be of no use.
    assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
    declared = ["i32" if kind == "i32" else "pointer" for kind in described.signature().values()]
    entry = re.search(r"\.entry[^)]*\)", ptx).group()
    assert [PTX_TYPES[kind] for kind in re.findall(r"\.param \.(\w+)", entry)] == [*declared, "pointer", "pointer"]
    if name in ("gate_up", "down") and dtype == torch.bfloat16:
        assert instructions["wgmma.mma_async"] or instructions["mma.sync"], "no tensor cores"
        assert instructions["cp.async.cg"], "no 16-byte asynchronous copies"


def test_grids_and_scratch_at_the_real_sizes():
    few, many = launches(256, torch.bfloat16), launches(16384, torch.bfloat16)
    assert few["align"].scalars == (2048, 188)
    assert few["gate_up"].grid == (188, 22)
    assert few["down"].grid == (188, 44)
    assert few["combine"].grid == (256, 3)
    assert many["align"].scalars == (131072, 2174)
    assert many["gate_up"].outputs[0].shape == (131072, 704)


def test_a_launch_that_is_not_the_kernels_is_refused():
    described = launches(256, torch.bfloat16)["combine"]
    with pytest.raises(ValueError, match=r"combine_kernel: after 3 inputs, scalars and outputs come the arguments \['TOP_K'"):
        replace(described, scalars=(256,)).signature()
