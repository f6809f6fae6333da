"""Throughput of 16 requests at once against one at a time, and a short request's first canvas behind a 16,384-token prompt.

The checkpoint is random, made from a seed: 100 million parameters in experts, more than the caches hold, and a canvas of 16
tokens, so that one sequence's denoising step is bound by reading weights and a batch shares the reading. (With long canvases a
CPU is bound by arithmetic, and a batch gains little.) It runs uncompiled. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import command_line
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small_checkpoints import network_session, random_checkpoint  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from backend.engine import Engine, EngineLimits  # noqa: E402
from backend.errors import RequestError  # noqa: E402
from backend.generation_defaults import GenerationDefaults  # noqa: E402
from backend.sampling_config import SamplingConfig  # noqa: E402

CANVAS = 16
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_experts": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 64,
    "global_head_dim": 64,
    "sliding_window": 256,
    "max_position_embeddings": 32_768,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
}


class Bench:
    """The engine, and requests of fixed work."""

    def __init__(self, checkpoint: Path, steps: int):
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        defaults = GenerationDefaults.from_json({"eos_token_id": [], "max_denoising_steps": steps})
        limits = EngineLimits(max_cached_tokens=40_000, prefix_cache=False)
        self.engine = Engine(network_session(checkpoint), tokenizer, defaults, limits)
        self.scheduler = self.engine.scheduler

    def add(self, length: int, seed: int, max_tokens: int = 2 * CANVAS) -> list:
        prompt = torch.randint(2048, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        sampling = SamplingConfig(seed=seed, max_tokens=max_tokens, confidence_threshold=0)
        outputs: list = []
        self.scheduler.add(prompt, sampling.resolve(self.engine.defaults), outputs.append)
        return outputs

    def run(self, *outputs: list) -> float:
        """Seconds until every one of `outputs` has something, or until nothing is left to do."""
        started = time.perf_counter()
        while not self.scheduler.is_idle and not (outputs and all(outputs)):
            self.scheduler.tick()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=command_line.count, default=16)
    parser.add_argument("--steps", type=command_line.count, default=4, help="denoising steps a canvas")
    parser.add_argument("--rounds", type=command_line.count, default=2)
    options = parser.parse_args()
    count = options.concurrency
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(random_checkpoint(Path(directory), seed=1, canvas_length=CANVAS, **SHAPE), options.steps)

        def one_by_one() -> list[list]:
            results = []
            for seed in range(count):
                results.append(bench.add(20, seed))
                bench.run()
            return results

        def at_once() -> list[list]:
            results = [bench.add(20, seed) for seed in range(count)]
            bench.run()
            return results

        tokens_of = [[[output.token_ids for output in each] for each in way()] for way in (one_by_one, at_once)]
        if tokens_of[0] != tokens_of[1]:
            sys.exit("tokens at once differ from tokens one by one; nothing was timed")
        seconds: dict[str, list[float]] = {"1": [], str(count): []}
        for _ in range(options.rounds):
            for name, way in zip(seconds, (one_by_one, at_once), strict=True):
                started = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - started)
        print({name: [round(each, 2) for each in times] for name, times in seconds.items()}, flush=True)
        alone = bench.run(bench.add(20, seed=100))
        bench.run()
        bench.add(16_384, seed=101)
        started = time.perf_counter()
        bench.scheduler.tick()
        chunk = time.perf_counter() - started
        behind = bench.run(bench.add(20, seed=102))
        bench.scheduler.fail_all(RequestError("CANCELLED", "enough"))

    median = {name: statistics.median(times) for name, times in seconds.items()}
    table = Table("requests at once", "tokens/s", "spread", "x one at a time")
    for name, times in seconds.items():
        spread = (max(times) - min(times)) / median[name]
        rate = f"{count * 2 * CANVAS / median[name]:.1f}"
        table.add_row(name, rate, f"{spread:.0%}", f"{median['1'] / median[name]:.2f}")
    Console().print(table)
    print(
        f"first canvas of a 20-token prompt ({options.steps} steps): alone {alone:.2f} s, behind 16,384 tokens {behind:.2f} s"
    )
    print(f"one chunk of the long prompt (2048 tokens): {chunk:.2f} s")
    record = {
        "benchmark": "concurrency",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": {name: [round(each, 3) for each in times] for name, times in seconds.items()},
        "ratio": round(median["1"] / median[str(count)], 2),
        "first_canvas_s": {"alone": round(alone, 3), "behind": round(behind, 3), "chunk": round(chunk, 3)},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
