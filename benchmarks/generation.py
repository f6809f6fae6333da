"""Generation against transformers' `generate`: same checkpoint, dtype, threads, prompts and noise, so the same tokens.

    python benchmarks/generation.py --checkpoint checkpoints/tiny --engine engines/diffusiongemma

Cases: batches of 1, 4 and 16 sequences with a fixed number of denoising steps; and adaptive steps where the checkpoint can
answer (it has a chat template), on questions of the tiny tasks. transformers runs its fastest expert implementation with a
dynamic and with a static cache, both not compiled. The floor is what this machine needs at least for a step's bytes and
operations (`step_cost.py`). What was timed last is compared too. The last line is JSON.
"""

import argparse
import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import command_line
import torch
from machine import measure_ceilings
from measuring import Report, in_turns, refuse
from step_cost import step_cost
from transformers import AutoTokenizer
from transformers_generation import CACHES, Batch, Noise, Transformers

from backend import LLM, SamplingConfig
from contract.manifest import read_manifest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "checkpoints"))

from tiny_tasks import questions  # noqa: E402

OURS = "this engine"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Batches that are generated one after the other, and timed together."""

    name: str
    batches: list[Batch]
    fixed_steps: int | None
    rounds: int

    @property
    def num_tokens(self) -> int:
        return sum(len(batch.prompts) * batch.max_tokens for batch in self.batches)


def main() -> None:
    options = _parser().parse_args()
    build = read_manifest(options.engine).build
    if (build.device, build.dtype) != ("cpu", "float32"):
        refuse(f"{options.engine} is for {build.dtype} on {build.device}, and only float32 on the CPU gives the same tokens")
    report = Report(benchmark=f"generation, {options.checkpoint.name}")
    llm, other = LLM(options.engine), Transformers(options.checkpoint)
    experts_ms = other.choose_experts()
    report.notes.append(f"transformers' experts, ms of a forward pass: {experts_ms}; the fastest is used")
    ceilings = measure_ceilings(3)
    systems = {f"transformers, {cache} cache": cache for cache in options.caches}
    for case in _cases(options, other):
        measure(case, llm, other, systems, report)
        if case.fixed_steps:
            model, batch = read_manifest(options.engine).model, case.batches[0]
            cost = step_cost(model, batch=len(batch.prompts), prefix=len(batch.prompts[0]))
            report.add(case.name, "floor of this machine", 1e3 * cost.floor_s(*ceilings), "ms a step")
            parts = ", ".join(f"{name} {each / 1e9:.2f}" for name, each in cost.operations.items())
            report.notes.append(f"{case.name}: a step reads {cost.read_bytes / 1e6:.1f} MB at least; GFLOP: {parts}")
    report.finish()


def measure(case: Case, llm: LLM, other: Transformers, caches: dict[str, str], report: Report) -> None:
    """1. transformers' tokens with our noise. 2. Ours must be the same. 3. All systems in turns, 4. and still the same; but a
    static cache, which rounds differently, may differ where a random network is near a tie: the report says how often."""
    noises = [Noise(batch, other.canvas_length, other.vocab_size) for batch in case.batches]
    expected = []
    for batch, noise in zip(case.batches, noises, strict=True):
        with noise.injected():  # 1.
            expected.append(other.generate(batch))

    def generated() -> list[list[list[int]]]:
        return [ours(llm, batch) for batch in case.batches]

    def theirs(cache: str) -> list[list[list[int]]]:
        results = []
        for batch, noise in zip(case.batches, noises, strict=True):
            with noise.replayed():
                results.append(other.generate(batch, cache=cache))
        return results

    def compare(name: str, results: list[list[list[int]]]) -> None:
        if different := count_different(results, expected):
            refuse(f"{case.name}: {different} sequences of {name} differ from transformers' with the same noise")

    compare(OURS, generated())  # 2.
    last: dict[str, list[list[list[int]]]] = {}
    runs = {name: lambda cache=cache: theirs(cache) for name, cache in caches.items()} | {OURS: generated}
    timed = {name: lambda name=name, run=run: last.__setitem__(name, run()) for name, run in runs.items()}
    timings = in_turns(timed, case.rounds, doing=case.name)  # 3.
    for name, results in last.items():  # 4.
        if name == OURS or caches[name] == "dynamic":
            compare(name, results)
        elif different := count_different(results, expected):
            report.notes.append(f"{case.name}: {different} sequences of {name} are not those of its dynamic cache")
    for name, timing in timings.items():
        report.add(case.name, name, case.num_tokens / timing.median_s, "tokens/s", timing)
    # Adaptive sequences of a batch end at different steps, so a batch's step is no unit there.
    num_canvases = case.num_tokens // other.canvas_length
    num_steps = sum(sum(noise.num_steps) for noise in noises)
    unit, count = ("ms a step", num_steps) if case.fixed_steps else ("ms a canvas", num_canvases)
    for name, timing in timings.items():
        report.add(case.name, name, 1e3 * timing.median_s / count, unit, timing)


def count_different(results: list[list[list[int]]], expected: list[list[list[int]]]) -> int:
    """Sequences, over all batches."""
    pairs = zip(itertools.chain(*results), itertools.chain(*expected), strict=True)
    return sum(result != wanted for result, wanted in pairs)


def ours(llm: LLM, batch: Batch) -> list[list[int]]:
    sampling = [
        SamplingConfig(seed=seed, max_tokens=batch.max_tokens, ignore_eos=True, **batch.settings) for seed in batch.seeds
    ]
    return [result.token_ids for result in llm.generate(batch.prompts, sampling, use_tqdm=False)]


def _cases(options: argparse.Namespace, other: Transformers) -> Iterator[Case]:
    tokens = options.canvases * other.canvas_length
    generator = torch.Generator().manual_seed(0)
    fixed = {"max_denoising_steps": options.steps, "confidence_threshold": 1e-9}
    image = other.model.config.image_token_id
    for index, size in enumerate(options.batches):
        prompts = torch.randint(other.vocab_size, (max(size, options.prompts), options.prompt_tokens), generator=generator)
        prompts[prompts == image] = 0
        yield Case(
            name=f"batch {size}, {options.steps} steps",
            batches=_batches(prompts.tolist(), size, tokens, fixed),
            fixed_steps=options.steps,
            rounds=max(1, options.rounds - index),
        )
    if (options.checkpoint / "chat_template.jinja").exists():
        prompts = question_prompts(options.checkpoint, max(*options.batches, options.prompts))
        for index, size in enumerate(options.batches):
            yield Case(
                name=f"batch {size}, adaptive",
                batches=_batches(prompts[: max(size, options.prompts)], size, tokens, {}),
                fixed_steps=None,
                rounds=max(1, options.rounds - index),
            )


def _batches(prompts: list[list[int]], size: int, max_tokens: int, settings: dict) -> list[Batch]:
    return [
        Batch(
            prompts=prompts[begin : begin + size],
            seeds=list(range(begin, begin + len(prompts[begin : begin + size]))),
            max_tokens=max_tokens,
            settings=settings,
        )
        for begin in range(0, len(prompts), size)
    ]


def question_prompts(checkpoint: Path, count: int) -> list[list[int]]:
    """Counting questions of one length, as transformers batches them without padding."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for question in questions(11, held_out=True, tasks=("count",)):
        text = tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        alike = by_length[len(prompt)]
        alike.append(prompt)
        if len(alike) == count:
            return alike
    raise AssertionError("questions never end")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=command_line.checkpoint, required=True)
    parser.add_argument("--engine", type=command_line.engine, required=True)
    parser.add_argument(
        "--batches", type=command_line.count, nargs="+", default=(1, 4, 16), help="each takes one round less than the last"
    )
    parser.add_argument("--rounds", type=command_line.count, default=5)
    parser.add_argument("--prompts", type=command_line.count, default=4, help="at least so many a case")
    parser.add_argument("--prompt-tokens", type=command_line.count, default=40)
    parser.add_argument("--canvases", type=command_line.count, default=2, help="for each prompt")
    parser.add_argument("--steps", type=command_line.count, default=12, help="fixed denoising steps a canvas")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=CACHES, help="of transformers")
    return parser


if __name__ == "__main__":
    main()
