"""What it takes to build an engine, to load its weights, and to start serving: seconds, GB/s, and peak memory with what it is.

    python benchmarks/loading.py --checkpoint build/benchmarks/small --engine build/benchmarks/engines/small

1. Builds the engine anew, without the compiler's cache. 2. Binds the weights and reads them all, from the page cache and
from the disk, against transformers' `from_pretrained`; checked first: what is bound equals the file. 3. Starts a server and
lets it denoise a few canvases at once; checked: every request gets its tokens. 4. transformers' `generate` of as many, in a
process of its own.

The goals: the builder, and the process that owns the engine, take at most 1.3 times the weights, plus, when serving, the KV
pages in use and the planned workspace. Where the memory is, is in the notes (`resident_memory.py`). The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import command_line
import torch
from measuring import Goal, Report, in_turns, refuse
from resident_memory import PeakWatcher, Resident, peak_bytes
from transformers_generation import Batch, Transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from server_clients import ANY_PORTS, ask  # noqa: E402
from server_processes import engine_workers  # noqa: E402

from backend.planner import EngineLimits, pages_needed, plan_memory  # noqa: E402
from backend.triton_server.launch import TritonServer  # noqa: E402
from backend.weights import bind_weights  # noqa: E402
from contract.checkpoint import Checkpoint  # noqa: E402
from contract.manifest import Manifest, read_manifest  # noqa: E402

OURS, THEIRS = "this engine", "transformers"
ALLOWED_SHARE = 1.3
PROMPT_TOKENS, STEPS = 40, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=command_line.checkpoint, required=True)
    parser.add_argument("--engine", type=command_line.engine, required=True)
    parser.add_argument("--no-build", action="store_true", help="take the engine that is there")
    parser.add_argument("--goals", action="store_true", help="judge the memory; for weights that outweigh PyTorch")
    parser.add_argument("--sequences", type=command_line.count, default=4, help="served at once")
    parser.add_argument("--rounds", type=command_line.count, default=3)
    parser.add_argument("--transformers-peak", action="store_true", help=argparse.SUPPRESS)  # step 4, in its own process
    options = parser.parse_args()
    if options.transformers_peak:
        print(json.dumps(transformers_peak(options)))
        return
    report = Report(benchmark=f"loading, {options.checkpoint.name}")
    built = None if options.no_build else build(options, report)
    manifest = read_manifest(options.engine)
    plan = plan_memory(manifest, EngineLimits())
    report.add("size", "weights", plan.weights_bytes / 1e6, "MB")
    if built is not None and options.goals:
        add_goal(report, "peak memory of the builder", built.total, ALLOWED_SHARE * plan.weights_bytes)
    load_weights(options, manifest, report)
    serve(options, manifest, report)
    command = [sys.executable, *sys.argv, "--transformers-peak"]
    theirs = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    report.add("ready to generate", f"{THEIRS}, imports not counted", theirs["start_s"], "s")
    report.add(f"peak memory, {options.sequences} sequences", THEIRS, theirs["peak_bytes"] / 1e6, "MB")
    report.finish()


def build(options: argparse.Namespace, report: Report) -> Resident:
    """The builder's largest sample."""
    command = [sys.executable, "-m", "builder", "build", options.checkpoint, options.engine, "--force"]
    command += ["--target", "inductor", "--device", "cpu", "--dtype", "float32"]
    started_s = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=Path.cwd())
    with PeakWatcher(process.pid) as watcher:
        if process.wait():
            refuse(f"the builder ended with exit code {process.returncode}")
    report.add("build", OURS, time.perf_counter() - started_s, "s")
    builder = watcher.peaks["builder"]
    report.add("peak memory while building", "builder", builder.total / 1e6, "MB")
    report.add("peak memory while building", "builder and compilers", watcher.together.total / 1e6, "MB")
    report.notes.append(
        f"builder at its peak, MB: {builder.megabytes()}; with the C++ compiler: {watcher.together.megabytes()}"
    )
    return builder


def load_weights(options: argparse.Namespace, manifest: Manifest, report: Report) -> None:
    """From the page cache, then from the disk."""
    files = sorted(options.checkpoint.glob("*.safetensors"))

    def ours() -> None:
        touch(bind_weights(manifest, options.engine, options.checkpoint).values())

    def theirs() -> None:
        touch(Transformers(options.checkpoint).model.state_dict().values())

    buffer = bytearray(min(64 << 20, max(file.stat().st_size for file in files)))

    def plainly() -> None:
        for file in files:
            with file.open("rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass

    bound, stored = bind_weights(manifest, options.engine, options.checkpoint), Checkpoint(options.checkpoint)
    for binding, weight in manifest.weights.items():
        first, *others = (stored.tensor(name).to(bound[binding].dtype) for name in weight.tensors)
        if torch.equal(bound[binding], torch.cat([first, *others]) if others else first):
            continue
        refuse("weights as they are bound differ from the checkpoint's")
    del bound, stored
    size_gb = sum(file.stat().st_size for file in files) / 1e9
    systems = {THEIRS: theirs, OURS: ours, "reading the file": plainly}
    for name, timing in in_turns(systems, options.rounds, doing="weights").items():
        report.add("weights, from the page cache", name, size_gb / timing.median_s, "GB/s", timing)

    def dropped(run) -> None:
        for file in files:
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started_s = time.perf_counter()
        run()
        seconds[run].append(time.perf_counter() - started_s)

    seconds: dict = {run: [] for run in systems.values()}
    in_turns(
        {name: lambda run=run: dropped(run) for name, run in systems.items()}, options.rounds, doing="weights, from the disk"
    )
    for name, run in systems.items():
        report.add("weights, from the disk", name, size_gb / sorted(seconds[run])[len(seconds[run]) // 2], "GB/s")


def touch(tensors) -> None:
    """Reads one number of every page, which brings the page in."""
    for tensor in tensors:
        tensor.detach().contiguous().flatten().view(torch.uint8)[:: os.sysconf("SC_PAGE_SIZE")].sum()


def serve(options: argparse.Namespace, manifest: Manifest, report: Report) -> None:
    settings = {"max_denoising_steps": STEPS, "confidence_threshold": 1e-9, "ignore_eos": True}
    settings["max_tokens"] = manifest.model.canvas_length

    def one(index: int) -> int:
        prompt = [5 + index] * PROMPT_TOKENS
        responses = ask(server.grpc_url, input_ids=prompt, seed=index, sampling_parameters=json.dumps(settings))
        return sum(len(response.token_ids) for response in responses)

    started_s = time.perf_counter()
    with TritonServer(engine_dir=options.engine, **ANY_PORTS) as server:
        report.add("ready to generate", f"{OURS}, from nothing to a server", time.perf_counter() - started_s, "s")
        with PeakWatcher(server.pid) as watcher, ThreadPoolExecutor(options.sequences) as pool:
            counts = list(pool.map(one, range(options.sequences)))
        if counts != [manifest.model.canvas_length] * options.sequences:
            refuse(f"{options.sequences} requests of one canvas each got {counts} tokens")
        [worker] = engine_workers(server)
        worker_bytes = peak_bytes(worker)
    case = f"peak memory, {options.sequences} sequences"
    report.add(case, f"{OURS}, engine worker", worker_bytes / 1e6, "MB")
    report.add(case, f"{OURS}, whole server", watcher.together.total / 1e6, "MB")
    for program, sample in watcher.peaks.items():
        report.notes.append(f"{program} at its peak while serving, MB: {sample.megabytes()}")
    plan = plan_memory(manifest, EngineLimits())
    used = pages_needed(PROMPT_TOKENS, plan.page_size, plan.kept_tokens)
    kv_bytes = options.sequences * sum(plan.page_bytes[kind] * count for kind, count in used.items())
    report.notes.append(f"workspace as planned {plan.workspace_bytes / 1e6:.0f} MB, KV pages in use {kv_bytes / 1e6:.1f} MB")
    allowed_bytes = ALLOWED_SHARE * plan.weights_bytes + kv_bytes + plan.workspace_bytes
    if options.goals:
        add_goal(report, "peak memory of the engine worker", worker_bytes, allowed_bytes)


def transformers_peak(options: argparse.Namespace) -> dict[str, float]:
    started_s = time.perf_counter()
    other = Transformers(options.checkpoint)
    start_s = time.perf_counter() - started_s
    other.model.set_experts_implementation("eager")  # the one with the least memory
    other.generate(
        Batch(
            prompts=[[5 + index] * PROMPT_TOKENS for index in range(options.sequences)],
            seeds=list(range(options.sequences)),
            max_tokens=other.canvas_length,
            settings={"max_denoising_steps": STEPS, "confidence_threshold": 1e-9},
        )
    )
    return {"start_s": start_s, "peak_bytes": peak_bytes()}


def add_goal(report: Report, what: str, value_bytes: float, limit_bytes: float) -> None:
    report.goals.append(Goal(what=what, value=round(value_bytes / 1e6), limit=round(limit_bytes / 1e6), unit="MB"))


if __name__ == "__main__":
    main()
