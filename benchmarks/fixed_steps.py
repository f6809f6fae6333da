"""Seconds that canvases of so many fixed steps take, by how many requests are at once, of one engine after another.

    python benchmarks/fixed_steps.py --engine engines/26b engines/26b-two-gpus --at-once 1 2 4 8

Each request has a prompt of 60 words that is like no other's, and an answer of one canvas. All come at once, offline; encoding
their prompts is in the figure. Where the tokens of a later engine are not those of the first, a note says so. The last line is
JSON.
"""

import argparse
import gc
import random
import sys
import time
from pathlib import Path

import command_line
import torch
from measuring import Report, Timing

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from backend import LLM, SamplingConfig  # noqa: E402

WORDS = "add count reverse color weather price figure what is the of and from".split()
Answers = dict[tuple[int, int], list[list[int]]]
"""By how many are at once, and the round: the tokens of each request."""


def measured(engine: Path, at_once: list[int], steps: int, rounds: int) -> tuple[dict[int, Timing], Answers]:
    llm = LLM(engine, max_sequences=max(at_once))
    length = llm._engine.session.manifest.model.canvas_length
    timings, answers = {}, {}
    for count in at_once:
        seconds = []
        for number in range(rounds + 1):  # the first is not counted
            rng = random.Random(number)
            prompts = [f"{count} {number} {which} " + " ".join(rng.choices(WORDS, k=60)) for which in range(count)]
            fixed = {"max_tokens": length, "max_denoising_steps": steps, "confidence_threshold": 0, "ignore_eos": True}
            configs = [SamplingConfig(seed=which, **fixed) for which in range(count)]
            started_s = time.perf_counter()
            results = llm.generate(prompts, configs)
            seconds.append(time.perf_counter() - started_s)
            if any(result.num_steps != [steps] for result in results):
                sys.exit(f"check failed: {engine}: got canvases of fewer steps than {steps}")
            answers[count, number] = [result.token_ids for result in results]
        timings[count] = Timing(seconds=seconds[1:])
    return timings, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=command_line.engine, nargs="+", required=True)
    parser.add_argument("--at-once", type=command_line.count, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=command_line.count, default=48)
    parser.add_argument("--rounds", type=command_line.count, default=3)
    options = parser.parse_args()
    report, first = Report(benchmark=f"canvases of {options.steps} steps"), None
    for engine in options.engine:
        timings, answers = measured(engine, options.at_once, options.steps, options.rounds)
        for count, timing in timings.items():
            report.add(f"{count} at once", engine.name, timing.median_s, "s", timing)
        first = first or answers
        if num_other := sum(answers[key] != first[key] for key in first):
            report.notes.append(f"{engine.name}: other tokens than the first engine in {num_other} of {len(first)} rounds")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    report.rows.sort(key=lambda row: options.at_once.index(int(row.case.split()[0])))
    report.finish()


if __name__ == "__main__":
    main()
