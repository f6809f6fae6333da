"""Writes a checkpoint of the 26B model's size with random weights, 51.7 GB.

It is for the whole way from `python -m builder build` to a server at full size, where the published weights are not to be had.

    python benchmarks/full_checkpoint.py build/benchmarks/full

Configuration, names, shapes and shards are the real ones, bfloat16. Norms are 1, products scaled by their fan-in, so that
activations stay of order one. The tokenizer is the tiny checkpoint's, its vocabulary filled up. Numbers are drawn on the GPU
where there is one.
"""

import argparse
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from small_checkpoint import widen_vocabulary

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small_checkpoints import TINY  # noqa: E402
from sparse_checkpoint import headers_26b, sparse_checkpoint  # noqa: E402

from contract.checkpoint import Checkpoint  # noqa: E402

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
VOCAB_SIZE = 262_144
NUM_WRITERS = 8  # a gigabyte of memory each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.directory.exists():
        sys.exit(f"error: {options.directory}: is there, expected a new name; choose another")
    started_s = time.perf_counter()
    num_bytes = make_full_checkpoint(options.directory, seed=options.seed)
    print(f"{options.directory}: {num_bytes / 1e9:.2f} GB, {time.perf_counter() - started_s:.0f} s")


def make_full_checkpoint(directory: Path, *, seed: int = 0) -> int:
    """Writes the checkpoint, whole or not at all, and returns the bytes of its tensors."""
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        sparse_checkpoint(staging)
        for name in TOKENIZER_FILES:
            shutil.copy(TINY / name, staging)
        widen_vocabulary(staging / "tokenizer.json", VOCAB_SIZE)
        num_bytes = fill(staging, seed)
        staging.chmod(0o755)
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return num_bytes


def fill(directory: Path, seed: int) -> int:
    """Random numbers for the zeros of every tensor; progress on standard error."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint, headers = Checkpoint(directory), headers_26b()

    def write(index: int, name: str) -> int:
        numbers, extent = random_numbers(name, headers[name][1], seed + index, device), checkpoint.extent(name)
        view = memoryview(numbers.cpu().view(torch.uint8).numpy()).cast("B")
        with extent.path.open("rb+", buffering=0) as file:
            file.seek(extent.offset)
            while view:
                view = view[file.write(view) :]
        return extent.num_bytes

    columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(NUM_WRITERS) as pool:
        task = progress.add_task("weights", total=sum(checkpoint.extent(name).num_bytes for name in headers))
        for num_bytes in pool.map(write, range(len(headers)), headers):
            progress.advance(task, num_bytes)
        return int(progress.tasks[task].completed)


def random_numbers(name: str, shape: list[int], seed: int, device: str) -> torch.Tensor:
    """bfloat16, on the device. Scaled as `random_model.random_weights` does."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.bfloat16)
    deviation = 1.0 if name.endswith("router.proj.weight") else shape[-1] ** -0.5
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=deviation, generator=generator)


if __name__ == "__main__":
    main()
