"""What it brings that new tokens go with a denoising step: tokens a second, with and without, by how many requests are at once.

    python benchmarks/mixed_steps.py --engine engines/26b --at-once 1 2 4 8 16

The engine is loaded once and asked offline. Each request has a prompt of 20 to 250 words and an answer of one to four canvases
of 10 to 18 steps, drawn from a seed, so that requests do not all wait for the same at once; one that ends is followed by the
next. The rounds take turns, and no prompt begins as one of before. The last line is JSON.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import command_line
import torch
from measuring import Report, refuse

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from backend import SamplingConfig  # noqa: E402
from backend.engine import Engine, EngineLimits  # noqa: E402

WORDS = "add count reverse color weather price figure what is the of and from".split()
APART, MIXED = "encoded apart", "with a step"


class Bench:
    """An engine, and requests that follow each other."""

    def __init__(self, engine: Path, max_sequences: int):
        self.engine = Engine.load(engine, EngineLimits(max_sequences=max_sequences))
        self.scheduler = self.engine.scheduler
        self.loop, self.num_runs = self.scheduler._loop, 0
        if not self.loop.can_mix:
            refuse(f"{engine}: got an engine without the program mixed, expected one for a GPU, not batch-invariant")

    def run(self, at_once: int, num_requests: int, *, mixed: bool) -> float:
        """Tokens a second."""
        self.loop.can_mix, rng = mixed, random.Random(at_once)
        self.num_runs += 1
        num_tokens = 0

        def follow(left: list[int]) -> None:
            if not left:
                return
            prompt = f"{self.num_runs} " + " ".join(rng.choices(WORDS, k=rng.choice((20, 60, 120, 250))))
            canvases, steps = rng.randint(1, 4), rng.randint(10, 18)
            sampling = SamplingConfig(
                seed=left.pop(),
                max_tokens=canvases * self.engine.session.manifest.model.canvas_length,
                max_denoising_steps=steps,
                confidence_threshold=0,
                ignore_eos=True,
            )

            def on_output(output) -> None:
                nonlocal num_tokens
                if isinstance(output, Exception):
                    raise output
                num_tokens += len(output.token_ids)
                if output.finish_reason:
                    follow(left)

            self.scheduler.add(self.engine.tokenizer.encode(prompt).ids, sampling.resolve(self.engine.defaults), on_output)

        left = list(range(num_requests))
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        for _ in range(at_once):
            follow(left)
        while not self.scheduler.is_idle:
            self.scheduler.tick()
        torch.cuda.synchronize()
        return num_tokens / (time.perf_counter() - started_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=command_line.engine, required=True)
    parser.add_argument("--at-once", type=command_line.count, nargs="+", default=(1, 2, 4, 8, 16))
    parser.add_argument("--rounds", type=command_line.count, default=2)
    options = parser.parse_args()
    command_line.need_cuda()
    bench, report = Bench(options.engine, max(options.at_once)), Report(benchmark=f"mixed steps, {options.engine.name}")
    for at_once in options.at_once:
        num_requests = max(8, 3 * at_once)
        speeds: dict[str, list[float]] = {APART: [], MIXED: []}
        for _ in range(options.rounds):
            for name, of_system in speeds.items():
                of_system.append(bench.run(at_once, num_requests, mixed=name == MIXED))
        for name, of_system in speeds.items():
            report.add(f"{at_once} at once", name, statistics.mean(of_system), "tokens/s")
    report.finish()


if __name__ == "__main__":
    main()
