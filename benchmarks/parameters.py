"""What sampling parameters cost: milliseconds a step of requests that ask for more than the plain step.

    python benchmarks/parameters.py --engine engines/diffusiongemma

On any engine. Steps are fixed, prompts random. First, requests of all kinds together must get the tokens that each gets alone.
"mixed": the first of the batch asks for everything, the others for nothing. The last line is JSON.
"""

import argparse

import command_line
import torch
from measuring import Report, in_turns, refuse

from backend import LLM, SamplingConfig
from contract.manifest import read_manifest

EVERYTHING = {"logit_bias": {5: 1.0}, "top_k": 64, "top_p": 0.95, "logprobs": True, "top_logprobs": 5}
KINDS = {
    "nothing": {},
    "logit_bias": {"logit_bias": {5: 1.0}},
    "top_k": {"top_k": 64},
    "top_p": {"top_p": 0.95},
    "min_p": {"min_p": 0.05},
    "logprobs": {"logprobs": True, "top_logprobs": 5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=command_line.engine, required=True)
    parser.add_argument("--batches", type=command_line.count, nargs="+", default=(1, 4))
    parser.add_argument("--steps", type=command_line.count, default=4)
    parser.add_argument("--rounds", type=command_line.count, default=3)
    options = parser.parse_args()
    length = read_manifest(options.engine).model.canvas_length
    llm = LLM(options.engine, max_sequences=max(*options.batches, len(KINDS)))
    fixed = {"max_tokens": length, "max_denoising_steps": options.steps, "confidence_threshold": 0, "ignore_eos": True}

    def generated(kinds: list[dict]) -> list[list[int]]:
        """The tokens of a request of each kind."""
        seeds = [torch.Generator().manual_seed(seed) for seed in range(len(kinds))]
        prompts = [torch.randint(100, 400, (32,), generator=seed).tolist() for seed in seeds]
        configs = [SamplingConfig(seed=seed, **fixed, **kind) for seed, kind in enumerate(kinds)]
        return [result.token_ids for result in llm.generate(prompts, configs)]

    report = Report(benchmark=f"sampling parameters, {options.engine.name}")
    every = list(KINDS.values())
    different = count_dependent(generated, every)
    if different:
        refuse(f"{different} of {len(every)} requests get other tokens together than alone")
    for batch in options.batches:
        batches = {name: [kind] * batch for name, kind in KINDS.items()}
        if batch > 1:
            batches["mixed"] = [EVERYTHING] + [{}] * (batch - 1)
        systems = {name: lambda kinds=kinds: generated(kinds) for name, kinds in batches.items()}
        for name, timing in in_turns(systems, options.rounds, doing=f"batch {batch}").items():
            report.add(f"batch {batch}", name, 1e3 * timing.median_s / options.steps, "ms a step", timing)
    report.finish()


def count_dependent(generated, kinds: list[dict]) -> int:
    """How many requests get other tokens together than where all others ask for nothing."""
    together = generated(kinds)
    alone = [generated([{}] * place + [kind])[place] for place, kind in enumerate(kinds)]
    return sum(own != other for own, other in zip(together, alone, strict=True))


if __name__ == "__main__":
    main()
