"""The machine that a benchmark ran on, and its ceilings: how fast it copies memory and multiplies float32 matrices.

    python benchmarks/machine.py

No program that reads B bytes and does N operations takes less time than max(B / bandwidth, N / rate); `step_cost.py` counts a
denoising step's. The last line is JSON.
"""

import argparse
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import command_line
import torch
from measuring import Report, in_turns, refuse

_COPIED_BYTES = 512 << 20  # far more than caches hold
_MATRIX = 2048


def describe_machine() -> dict[str, str | int | float]:
    """CPU, cores, memory and versions."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    packages = ("torch", "transformers", "tritonclient", "nvidia-pytriton")
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def measure_ceilings(rounds: int, *, copied_bytes: int = _COPIED_BYTES, matrix: int = _MATRIX) -> tuple[float, float]:
    """Bytes a second, read and written, of a copy; float32 operations a second of a square matrix product. The best of the
    rounds: a ceiling is what the machine can do.

    The product is checked against one in float64.
    """
    source, target = torch.ones(copied_bytes // 4), torch.empty(copied_bytes // 4)
    left, right, product = torch.randn(matrix, matrix), torch.randn(matrix, matrix), torch.empty(matrix, matrix)
    torch.mm(left, right, out=product)
    if not torch.allclose(product[:8].double(), left[:8].double() @ right.double(), atol=1e-2):
        refuse("the float32 matrix product differs from the one in float64")
    systems = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(left, right, out=product)}
    best = {name: min(timing.seconds) for name, timing in in_turns(systems, rounds, doing="ceilings").items()}
    return 2 * copied_bytes / best["copy"], 2 * matrix**3 / best["product"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=command_line.count, default=10)
    parser.add_argument("--quick", action="store_true", help="small sizes: for trying the command")
    options = parser.parse_args()
    sizes = {"copied_bytes": 8 << 20, "matrix": 256} if options.quick else {}
    bandwidth, rate = measure_ceilings(2 if options.quick else options.rounds, **sizes)
    report = Report(benchmark="machine")
    report.add("copy, read and written", "this machine", bandwidth / 1e9, "GB/s")
    report.add(f"float32 product, {torch.get_num_threads()} threads", "this machine", rate / 1e9, "GFLOP/s")
    report.notes.append(", ".join(f"{name} {value}" for name, value in describe_machine().items()))
    report.finish()


if __name__ == "__main__":
    main()
