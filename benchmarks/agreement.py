"""How far an engine's log probabilities are from exact ones, beside transformers': whether an engine of any size is right.

    python benchmarks/agreement.py --checkpoint checkpoints/26b --engine engines/26b engines/26b-fp8

Canvases after prompts of several lengths, of 1 step and of more, from the same noise. Compared are the log probabilities of the
20 likeliest tokens at each position, at the last step. Exact are those of transformers in float32. In bfloat16 two right
implementations differ by much at single positions, where a rounding chooses another expert; what they share is how far most
positions are from the exact ones. So an engine in bfloat16 is judged by transformers in bfloat16, and one in float32 by the
rounding of float32. The last line is JSON; where the engine is further off than it may be, the exit status is 1.

transformers' weights are in memory in float32, 103 GB for the 26B model; on a smaller GPU than an H200: --exact-on cpu.
"""

import argparse
import gc
import itertools
import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import command_line
import torch
from measuring import Goal, Report, refuse
from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer
from transformers_generation import Batch, Noise
from transformers_step import VISION, shared_model

from backend import LLM, SamplingConfig
from builder.config import read_model_config
from contract.checkpoint import Checkpoint
from contract.manifest import Manifest, read_manifest

THEIRS = "transformers"
LENGTHS = (60, 200, 500, 800, 1200, 1800, 2500)  # many, because one prompt in bfloat16 may be lucky
NUM_LIKELIEST = 20
MAX_RATIO = 1.5
MAX_FLOAT32_ERROR = 1e-3  # a logit is below 30, of which float32 rounds some hundred times in a pass
EXACT_EXPERTS = ("plain", "packed")  # the others stand for other numbers than the checkpoint's


@dataclass(frozen=True, kw_only=True)
class Case:
    prompt: tuple[int, ...]
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{len(self.prompt)} tokens, {self.steps} step{'s' * (self.steps > 1)}"

    @property
    def settings(self) -> dict:
        """Of both. A threshold that nothing reaches, so that no canvas ends early."""
        return {"max_denoising_steps": self.steps, "confidence_threshold": 1e-9}


@dataclass(frozen=True, kw_only=True)
class Distance:
    """From exact log probabilities, of each position. errors: root mean square over the 20 tokens; same: whether the likeliest
    token is the exact one, 0 or 1; both [positions] float32."""

    errors: torch.Tensor
    same: torch.Tensor

    @classmethod
    def of_all(cls, parts: Iterable["Distance"]) -> "Distance":
        errors, same = zip(*((part.errors, part.same) for part in parts), strict=True)
        return cls(errors=torch.cat(errors), same=torch.cat(same))

    def quantile(self, share: float) -> float:
        return self.errors.quantile(share).item()


@dataclass(frozen=True, kw_only=True)
class Likeliest:
    """Of each position of a canvas: tokens [C, 20] int64, falling by probability, and their log probabilities, float32."""

    tokens: torch.Tensor
    logprobs: torch.Tensor

    def distance(self, exact: torch.Tensor) -> Distance:
        """From the exact log probabilities [C, V]."""
        errors = (self.logprobs - exact.gather(1, self.tokens)).pow(2).mean(1).sqrt()
        return Distance(errors=errors, same=(self.tokens[:, 0] == exact.argmax(1)).float())


def tracked(sequence: Sequence, doing: str) -> Iterator:
    """Progress on standard error."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(sequence, description=doing)


def of_engine(engine: Path, cases: list[Case]) -> list[Likeliest]:
    llm = LLM(engine, max_sequences=1)
    asked = {"logprobs": True, "top_logprobs": NUM_LIKELIEST, "ignore_eos": True}
    length = llm._engine.session.manifest.model.canvas_length
    found = []
    for case in tracked(cases, engine.name):
        sampling = SamplingConfig(seed=case.seed, max_tokens=length, **asked, **case.settings)
        [result] = llm.generate(list(case.prompt), sampling, use_tqdm=False)
        pairs = torch.tensor(result.top_logprobs, dtype=torch.float64)
        found.append(Likeliest(tokens=pairs[..., 0].long(), logprobs=pairs[..., 1].float()))
    return found


class Transformers:
    """transformers' text model with a checkpoint's weights in a dtype, on a device."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype, device: str):
        opened = Checkpoint(checkpoint)
        names = [name for name in opened.names() if not name.startswith(VISION)]
        loading = tracked(names, f"transformers' weights, {dtype}")
        self._model = shared_model(checkpoint, {name: opened.tensor(name).to(device).to(dtype) for name in loading})
        self._model.set_experts_implementation("eager")
        if (checkpoint / "generation_config.json").exists():
            self._model.generation_config = self._model.generation_config_class.from_pretrained(checkpoint)
        self._device = device

    def logprobs(self, case: Case) -> torch.Tensor:
        """Of the last step, [C, V] float32."""
        config = self._model.config
        batch = Batch(prompts=[list(case.prompt)], seeds=[case.seed], max_tokens=config.canvas_length, settings=case.settings)
        noise = Noise(batch, config.canvas_length, config.text_config.vocab_size)
        with noise.injected():
            self._model.generate(
                torch.tensor(batch.prompts, device=self._device),
                max_new_tokens=batch.max_tokens,
                eos_token_id=None,
                pad_token_id=None,
                **batch.settings,
            )
        return noise.probabilities.log().cpu()

    def likeliest(self, case: Case) -> Likeliest:
        logprobs, tokens = self.logprobs(case).topk(NUM_LIKELIEST)
        return Likeliest(tokens=tokens, logprobs=logprobs)


def main() -> None:
    options = _parser().parse_args()
    if len({THEIRS, *(engine.name for engine in options.engine)}) <= len(options.engine):
        refuse(f"--engine: got one name twice, or {THEIRS}; expected names that tell the rows apart")
    manifests = {engine: read_manifest(engine) for engine in options.engine}
    build = next(iter(manifests.values())).build
    for engine, manifest in manifests.items():
        if (manifest.build.dtype, manifest.build.device) != (build.dtype, build.device):
            refuse(f"{engine} is for {manifest.build.dtype} on {manifest.build.device}, not {build.dtype} on {build.device}")
    if stored := read_model_config(options.checkpoint).experts_dtype:
        refuse(f"{options.checkpoint}: got experts in {stored}, expected the checkpoint that they were made from")
    cases = list(_cases(options, manifests[options.engine[0]]))
    systems = {}
    if build.dtype != "float32":
        other = Transformers(options.checkpoint, torch.bfloat16, build.device)
        systems[THEIRS] = [other.likeliest(case) for case in tracked(cases, "transformers")]
        del other
        gc.collect()
        torch.cuda.empty_cache()
    for engine in options.engine:
        # In a process of its own, which leaves nothing on the GPU.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            systems[engine.name] = pool.submit(of_engine, engine, cases).result()
    exact = Transformers(options.checkpoint, torch.float32, options.exact_on or build.device)
    report = Report(benchmark=f"agreement, {build.dtype} on {build.device}")
    distances = {name: defaultdict(list) for name in systems}
    for at, case in enumerate(tracked(cases, "exact")):
        logprobs = exact.logprobs(case)
        for name, found in systems.items():
            distances[name][case.name].append(found[at].distance(logprobs))
    for case in dict.fromkeys(case.name for case in cases):
        of_case = {name: Distance.of_all(each[case]) for name, each in distances.items()}
        for name, distance in of_case.items():
            report.add(case, name, distance.quantile(0.5), "nats")
        for name, distance in of_case.items():
            report.add(case, name, 100 * distance.same.mean().item(), "% same")
    report.notes.append("nats: how far the log probabilities of the median position are from the exact ones, root mean square")
    whole = {name: Distance.of_all(itertools.chain(*each.values())) for name, each in distances.items()}
    for engine, manifest in manifests.items():
        if manifest.model.experts_dtype or manifest.build.expert_weights not in EXACT_EXPERTS:
            report.notes.append(f"{engine.name}: not judged, its experts' weights are other numbers than the checkpoint's")
        else:
            report.goals += _goals(engine.name, whole, build.dtype)
    report.finish()
    if not all(goal.is_met for goal in report.goals):
        sys.exit(1)


def _goals(name: str, distances: dict[str, Distance], dtype: str) -> Iterator[Goal]:
    """distances: by system, of all cases together."""
    for what, share in (("half of the positions", 0.5), ("nine of ten", 0.9)):
        own = distances[name].quantile(share)
        if dtype == "float32":
            yield Goal(what=f"{name}, {what} within", value=float(f"{own:.3g}"), limit=MAX_FLOAT32_ERROR, unit="nats")
        else:
            ratio = float(f"{own / distances[THEIRS].quantile(share):.3g}")
            yield Goal(what=f"{name}, {what} within, over transformers'", value=ratio, limit=MAX_RATIO, unit="x")


def _cases(options: argparse.Namespace, manifest: Manifest) -> Iterator[Case]:
    """A chat of one question for each length, with as many lines as it takes."""
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    longest = manifest.model.max_position_embeddings - manifest.model.canvas_length
    for length in options.prompt_tokens:
        lines, prompt = ["Which of these lines is the odd one out, and why?"], []
        while len(prompt) < min(length, longest):
            lines.append(f"{len(lines)}. A box of {7 * len(lines) % 31} apples weighs {13 * len(lines) % 97} pounds.")
            messages = [{"role": "user", "content": "\n".join(lines)}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            prompt = tokenizer.encode(text, add_special_tokens=False)
        for steps, seed in itertools.product(options.steps, range(options.canvases)):
            yield Case(prompt=tuple(prompt[-longest:]), steps=steps, seed=seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=command_line.checkpoint, required=True)
    parser.add_argument("--engine", type=command_line.engine, nargs="+", required=True)
    parser.add_argument("--prompt-tokens", type=command_line.count, nargs="+", default=LENGTHS, help="about")
    parser.add_argument("--steps", type=command_line.count, nargs="+", default=(1, 3), help="denoising steps of a canvas")
    parser.add_argument("--canvases", type=command_line.count, default=1, help="each from other noise")
    parser.add_argument(
        "--exact-on", choices=("cpu", "cuda"), help="where to compute the exact ones, if not where the engine runs"
    )
    return parser


if __name__ == "__main__":
    main()
