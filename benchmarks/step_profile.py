"""Where a denoising step's time goes: by operator, with PyTorch's profiler, beside the floor of each kind of product.

    python benchmarks/step_profile.py --engine build/benchmarks/engines/small

Self time of the operators that take most of one canvas, the rest together; "unseen" is what no operator accounts for: loops
that the compiler made, and Python. The tokens with and without the profiler are compared first. The last line is JSON.
"""

import argparse
import time

import command_line
import torch
from machine import measure_ceilings
from measuring import Report, refuse
from step_cost import step_cost
from torch.profiler import ProfilerActivity, profile

from backend import LLM, SamplingConfig
from contract.manifest import read_manifest

OURS = "this engine"
LISTED = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=command_line.engine, required=True)
    parser.add_argument("--batch", type=command_line.count, default=1)
    parser.add_argument("--steps", type=command_line.count, default=4)
    parser.add_argument("--prompt-tokens", type=command_line.count, default=64)
    options = parser.parse_args()
    model, llm = read_manifest(options.engine).model, LLM(options.engine)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(20, 400, (options.batch, options.prompt_tokens), generator=generator).tolist()
    common = {"max_tokens": model.canvas_length, "ignore_eos": True, "confidence_threshold": 1e-9}
    sampling = [SamplingConfig(seed=seed, max_denoising_steps=options.steps, **common) for seed in range(options.batch)]

    def generate() -> list[list[int]]:
        return [result.token_ids for result in llm.generate(prompts, sampling, use_tqdm=False)]

    expected = generate()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        started_s = time.perf_counter()
        tokens = generate()
        elapsed_ms = 1e3 * (time.perf_counter() - started_s)
    if tokens != expected:
        refuse("tokens with the profiler differ from those without it")
    own_ms = {each.key: each.self_cpu_time_total / 1e3 for each in profiled.key_averages()}
    report = Report(benchmark=f"profile of a step, {options.engine.name}")
    case = f"batch {options.batch}, prefill included"
    report.add(case, "whole step", elapsed_ms / options.steps, "ms a step")
    names = sorted(own_ms, key=own_ms.get, reverse=True)
    for name in names[:LISTED]:
        report.add(case, name, own_ms[name] / options.steps, "ms a step")
    report.add(case, "other operators", sum(own_ms[name] for name in names[LISTED:]) / options.steps, "ms a step")
    report.add(case, "unseen", max(0.0, elapsed_ms - sum(own_ms.values())) / options.steps, "ms a step")
    bandwidth, rate = measure_ceilings(3)
    cost = step_cost(model, batch=options.batch, prefix=options.prompt_tokens)
    for part, operations in cost.operations.items():
        report.add("floor of this machine", f"{part} products", 1e3 * operations / rate, "ms a step")
    report.add("floor of this machine", "reading weights", 1e3 * cost.read_bytes / bandwidth, "ms a step")
    report.finish()


if __name__ == "__main__":
    main()
