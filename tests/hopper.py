"""Compiles a described launch for Hopper on a machine without a GPU, and checks what came of it."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from triton.backends.compiler import GPUTarget  # noqa: E402

from plugins.triton_launch import HOPPER_SHARED_BYTES, Launch  # noqa: E402
from plugins.vocabulary.tables import Adjustment, num_words  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
MAX_REGISTERS = 255  # of one thread, by the same guide
PTX_TYPES = {"u64": "pointer", "u32": "i32"}
INSTRUCTIONS = ("wgmma.mma_async", "mma.sync", "cp.async.cg", "ld.global.v4")


def described_adjustment(slots: int, vocab_size: int, rows: int) -> Adjustment:
    def described(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    return Adjustment(
        bias=described(slots, vocab_size, dtype=torch.float32),
        biased=described(slots, dtype=torch.bool),
        repeated=described(slots, num_words(vocab_size), dtype=torch.int32),
        penalties=described(slots, dtype=torch.float32),
        slots=described(rows, dtype=torch.int64),
    )


class HopperDriver:
    """As much of a driver as a compiler's tracing asks for."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER


def check_compiles(launch: Launch, directory: Path, title: str, groups: int = 1, spilled: int = 0) -> dict[str, int]:
    """Compiles, prints what it uses, checks that it can run as declared. Returns counts of the PTX's instructions.

    groups: of warps, where a program's warps have different roles; the launch declares the warps of one. spilled: bytes of a
    thread's registers that may be in memory.
    """
    compiled = launch.compile(HOPPER)
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    (directory / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    used = resources(directory / "kernel.cubin")
    instructions = {each: count for each in INSTRUCTIONS if (count := ptx.count(each))}
    print(f"\n{title}: {launch.kernel.__name__}, {used}, shared {metadata.shared} bytes, {instructions}")

    assert used["LOCAL"] == 0 and used["STACK"] <= spilled, "registers spilled"
    assert used["REG"] <= MAX_REGISTERS
    assert metadata.shared <= HOPPER_SHARED_BYTES
    assert metadata.num_warps == groups * launch.num_warps
    assert metadata.num_ctas == 1
    # The two arguments that Triton appends, scratch for the kernel and for its profiler, must be of no use.
    assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
    declared = ["i32" if kind == "i32" else "pointer" for kind in launch.signature().values()]
    entry = re.search(r"\.entry[^)]*\)", ptx).group()
    assert [PTX_TYPES[kind] for kind in re.findall(r"\.param \.(\w+)", entry)] == [*declared, "pointer", "pointer"]
    return instructions


def check_weights_stay_in_their_threads(ptx: str) -> None:
    """What a thread loads of the first factor it multiplies: no block of instructions with a matrix product stores to shared
    memory what another thread is to have."""
    blocks = [block for block in re.split(r"\$L__\w+:", ptx) if "wgmma.mma_async" in block]
    assert blocks
    assert not any("st.shared" in block for block in blocks)


def check_factors_stay_until_they_are_read(cubin: Path) -> None:
    """The registers with the first factor of a matrix product keep it until the program has waited for the product.

    ptxas before CUDA 13.3 may give them to others before that: see `plugins.moe.arranged_kernel`. Looked at is what it made.
    """
    program = instructions_of(cubin)
    place = {address: index for index, (address, _) in enumerate(program)}
    products = [(index, match) for index, (_, text) in enumerate(program) if (match := _PRODUCT.match(text))]
    assert products, "no product has its first factor in registers"
    for index, match in products:
        first = int(match[1])
        factor = set(range(first, first + 4))
        following, seen, groups = index, set(), -1  # groups of products that were closed after the own one
        while following not in seen:
            seen.add(following)
            address, text = program[following]
            groups += _CLOSED.match(text) is not None
            waited = _WAITED.match(text)
            if waited and groups >= int(waited[1], 16):
                break
            overwritten = factor & _written(text)
            assert not overwritten, f"{program[index]} is followed by {text} at {address:#x}"
            back = _JUMP.search(text)
            target = int(back[1], 16) if back else address + 1
            following = place[target] if target <= address else following + 1
        else:
            raise AssertionError(f"{program[index]}: the program never waits for it")


def check_exponentials_are_spread(cubin: Path) -> None:
    """In loops with matrix products, exponentials have other instructions between them, three at least on average.

    Few units compute them. On an H200 a loop of attention that had them in a row took 5 % longer.
    """
    program = instructions_of(cubin)
    place = {address: index for index, (address, _) in enumerate(program)}
    jumps = [(index, int(back[1], 16)) for index, (_, text) in enumerate(program) if (back := _JUMP.search(text))]
    loops = [[text for _, text in program[place[to] : index]] for index, to in jumps if to < program[index][0]]
    loops = [loop for loop in loops if any("GMMA" in text for text in loop)]
    assert loops
    for loop in loops:
        at = [index for index, text in enumerate(loop) if "MUFU.EX2" in text]
        assert at[-1] - at[0] >= 4 * (len(at) - 1), f"{len(at)} exponentials within {at[-1] - at[0] + 1} instructions"


_PREDICATE = r"(?:@!?U?P\d+\s+)?"
_PRODUCT = re.compile(_PREDICATE + r"[HQI]GMMA\S*\s+R\d+,\s*R(\d+),\s*gdesc")
_CLOSED = re.compile(_PREDICATE + r"[HQI]GMMA.*\bgsb0\b")
_WAITED = re.compile(_PREDICATE + r"WARPGROUP\.DEPBAR\S*\s+gsb0,\s*(0x[0-9a-f]+)")
_JUMP = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
_WRITES = re.compile(_PREDICATE + r"(?!ST|RED|ATOM|LDGSTS|BAR|R2UR|\w*GMMA)(\S+)\s+R(\d+)\b")


def _written(text: str) -> set[int]:
    """The registers that an instruction writes, matrix products aside."""
    match = _WRITES.match(text)
    if not match:
        return set()
    count = 4 if ".128" in match[1] else 2 if ".64" in match[1] or "WIDE" in match[1] else 1
    return set(range(int(match[2]), int(match[2]) + count))


def instructions_of(cubin: Path) -> list[tuple[int, str]]:
    """Address and text of each instruction, in order."""
    printed = subprocess.run([_tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", printed)]


def resources(path: Path) -> dict[str, int]:
    """Of a cubin. REG: registers a thread. STACK: bytes of its stack frame, where registers are spilled. LOCAL: its other
    memory."""
    command = [_tool("cuobjdump"), "--dump-resource-usage", path]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}


def _tool(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
