"""Loading weights against a plain copy of the same bytes: from files to host memory or to a GPU, checked equal, then timed.

The files hold random bytes and are in the page cache; with `--cold` they are dropped from it before each load, which then reads
the disk. The copy that a load is compared with:

    cpu     `copy_` from host memory to host memory, one thread and as many as there are readers, whichever is faster
    cuda    `copy_` from pinned host memory to the GPU: the speed of the bus

Every load and every copy goes to the same memory, used before. The goal is 0.7 of the copy's speed. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import command_line
import torch

sys.path[:0] = [str(Path(__file__).parent.parent)]

from safetensors.torch import save_file  # noqa: E402

from backend.weight_lanes import CudaCopies, HostLane, StagedLane  # noqa: E402
from backend.weight_loading import Wanted, load, reading  # noqa: E402
from contract.checkpoint import Checkpoint  # noqa: E402

GOAL = 0.7
_TENSORS_A_FILE = 4


def write_files(directory: Path, num_bytes: int, num_files: int) -> dict[str, torch.Tensor]:
    """bfloat16 tensors of random bytes, and in `directory` a checkpoint of them. They are not mapped from there: what is mapped
    stays in the page cache."""
    rows = num_bytes // (num_files * _TENSORS_A_FILE * 2 * 4096)
    index, written = {}, {}
    for file in range(num_files):
        name = f"model-{file + 1:05}-of-{num_files:05}.safetensors"
        generator = torch.Generator().manual_seed(file)
        tensors = {
            f"weight.{file}.{each}": torch.randint(-(2**15), 2**15, (rows, 4096), dtype=torch.int16, generator=generator).view(
                torch.bfloat16
            )
            for each in range(_TENSORS_A_FILE)
        }
        save_file(tensors, directory / name)
        index |= dict.fromkeys(tensors, name)
        written |= tensors
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return written


def seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def drop_from_cache(checkpoint: Checkpoint) -> None:
    for path in checkpoint.directory.glob("*.safetensors"):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def measure(checkpoint: Checkpoint, source: dict[str, torch.Tensor], options: argparse.Namespace) -> dict:
    """Medians over rounds in which each system has its turn."""
    device = torch.device(options.device)
    names = sorted(source)
    targets = {name: torch.zeros(checkpoint.shape(name), dtype=torch.bfloat16, device=device) for name in names}
    if device.type == "cuda":
        source = {name: tensor.pin_memory() for name, tensor in source.items()}
    wanted = [Wanted(extent=checkpoint.extent(name), stored=torch.bfloat16, target=targets[name]) for name in names]

    def load_all() -> None:
        lane = HostLane
        if device.type == "cuda":
            after = torch.cuda.current_stream(device)
            lane = lambda most_bytes: StagedLane(most_bytes, CudaCopies([after]))  # noqa: E731
        load(wanted, lane, num_readers=options.readers, piece_bytes=options.piece_bytes)

    def copy_all() -> None:
        for name in names:
            targets[name].copy_(source[name], non_blocking=True)

    load_all()
    for name in names:
        assert torch.equal(targets[name].cpu().view(torch.int16), source[name].view(torch.int16)), name
    threads = {1, options.readers} if device.type == "cpu" else {1}
    systems = {f"copy, {count} threads": (count, copy_all) for count in sorted(threads)} | {"load": (1, load_all)}
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(options.rounds):
        for name, (count, work) in systems.items():
            if options.cold and name == "load":
                drop_from_cache(checkpoint)
            torch.set_num_threads(count)
            times[name].append(seconds(work, device))
    num_bytes = sum(tensor.nbytes for tensor in targets.values())
    speeds = {name: [num_bytes / each / 1e9 for each in measured] for name, measured in times.items()}
    median = {name: statistics.median(each) for name, each in speeds.items()}
    for name, each in speeds.items():
        print(f"{name:16} {median[name]:7.2f} GB/s ({min(each):.2f} to {max(each):.2f})", flush=True)
    copied = max(speed for name, speed in median.items() if name != "load")
    return {
        "benchmark": "weight_loading",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "bytes": num_bytes,
        "readers": options.readers,
        "cold": options.cold,
        "gb_per_s": {name: round(each, 2) for name, each in median.items()},
        "of_copy": round(median["load"] / copied, 2),
        "goal": GOAL,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--directory", type=command_line.directory, help="where the files are written, for the run; default: a temporary one"
    )
    parser.add_argument("--gigabytes", type=command_line.positive, default=1.0)
    parser.add_argument("--files", type=command_line.count, default=2)
    parser.add_argument("--rounds", type=command_line.count, default=7)
    parser.add_argument("--readers", type=command_line.count, help="default: as when an engine is loaded; so, too:")
    parser.add_argument("--piece-bytes", type=command_line.count)
    parser.add_argument("--cold", action="store_true", help="read from the disk in every round")
    options = parser.parse_args()
    usual = reading(options.device)
    options.readers = options.readers or usual.num_readers
    options.piece_bytes = options.piece_bytes or usual.piece_bytes
    if options.device == "cuda":
        command_line.need_cuda()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        written = write_files(Path(directory), int(options.gigabytes * 1e9), options.files)
        os.sync()
        print(f"{options.gigabytes} GB in {options.files} files in {directory}, {options.readers} readers", flush=True)
        result = measure(Checkpoint(Path(directory)), written, options)
    print(json.dumps(result))
    if not options.cold and result["of_copy"] < GOAL:
        sys.exit(1)


if __name__ == "__main__":
    main()
