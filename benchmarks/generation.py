"""Generation speed against transformers: same checkpoint, dtype, threads, prompts and noise; results are compared first.

Each round times both systems in turn. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from backend import LLM, SamplingConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from oracles import Oracle  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--steps", type=int, default=12, help="fixed denoising steps a canvas")
    options = parser.parse_args()

    llm, oracle = LLM(options.engine), Oracle(options.checkpoint)
    generator = torch.Generator().manual_seed(0)
    random_ids = torch.randint(oracle.vocab_size, (options.prompts, options.prompt_tokens), generator=generator)
    random_ids[random_ids == oracle.model.config.image_token_id] = 0
    prompts = random_ids.tolist()
    tokens = 2 * oracle.canvas_length
    fixed = {"max_denoising_steps": options.steps, "confidence_threshold": 1e-9}

    def ours(prompts: list[list[int]]) -> list[list[int]]:
        config = SamplingConfig(seed=1, max_tokens=tokens, ignore_eos=True, **fixed)
        return [result.token_ids for result in llm.generate(prompts, config)]

    def theirs(prompt: list[int]) -> list[int]:
        result = oracle.generate(prompt, seed=1, max_new_tokens=tokens, eos_token_id=None, pad_token_id=None, **fixed)
        return result.token_ids(max_tokens=tokens, ends=set())

    different = sum(alone != theirs(prompt) for prompt, [alone] in ((prompt, ours([prompt])) for prompt in prompts))
    if different:
        sys.exit(f"{different} of {len(prompts)} generations differ from transformers'; nothing was timed")

    seconds: dict[str, list[float]] = {"transformers": [], "this engine": [], f"this engine, batch {len(prompts)}": []}
    for _ in track(range(options.rounds), description="timing"):
        for name, run in zip(
            seconds,
            (
                lambda: [theirs(prompt) for prompt in prompts],
                lambda: [ours([prompt]) for prompt in prompts],
                lambda: ours(prompts),
            ),
            strict=True,
        ):
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)

    total = tokens * len(prompts)
    num_steps = 2 * options.steps * len(prompts)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    table = Table("system", "tokens/s", "ms a step of a sequence", "spread", "x transformers")
    for name, times in seconds.items():
        spread = (max(times) - min(times)) / median[name]
        ratio = median["transformers"] / median[name]
        table.add_row(
            name,
            f"{total / median[name]:.0f}",
            f"{1e3 * median[name] / num_steps:.2f}",
            f"{spread:.0%}",
            f"{ratio:.2f}",
        )
    Console().print(table)
    record = {
        "benchmark": "generation",
        "checkpoint": str(options.checkpoint),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": options.steps,
        "tokens_per_s": {name: round(total / value, 1) for name, value in median.items()},
        "ratio": {name: round(median["transformers"] / value, 3) for name, value in median.items()},
        "seconds": {name: [round(value, 4) for value in times] for name, times in seconds.items()},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
