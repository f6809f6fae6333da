"""A whole denoising step at the real model's size on one GPU or several, with random weights: checked, then timed.

Phases print as they go and their results are kept in the file of --output, so that what is cut off loses nothing. A phase that
fails prints why and the next one runs; the exit status is then 1. The last line is JSON.
"""

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import command_line
import torch
from random_model import open_sequences, random_cache, random_session, random_weights, read_text_model
from step_pieces import pieces_of
from step_timing import kernel_times, milliseconds, time_row, time_steps
from tokenizers import Tokenizer

from backend.batch_invariance import check_batch_invariance
from backend.captured_loop import CapturedLoop
from backend.generation_defaults import GenerationDefaults
from backend.sampling_config import SamplingConfig
from backend.scheduler import Scheduler
from builder.quantization import FP8, NVFP4
from contract.manifest import BuildConfig

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
DEFAULTS = GenerationDefaults.from_json({"eos_token_id": []})
SAMPLING = {"max_tokens": 256, "max_denoising_steps": 48, "confidence_threshold": 0, "ignore_eos": True, "seed": 1}
FIXED_STEPS = SamplingConfig(**SAMPLING)
CACHED_TOKENS = 32 * 65536 + 64 * 512
DEVICE = "cuda"
EXTRAS = {
    "logprobs": {"logprobs": True, "top_logprobs": 5},
    "logit_bias": {"logit_bias": {5: 1.0}},
    "top_k": {"top_k": 64},
    "top_p": {"top_p": 0.95},
    "infill": {"infill": [[5, 6, 7], 40, [8]]},
}
PHASES = tuple("ceilings weights compile check step extras pieces encode canvas memory profile transformers".split())


class Bench:
    """The phases, in order; each leaves its figures in `results`."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.checkpoint = options.checkpoint
        experts_dtype = FP8 if options.fp8_experts else NVFP4 if options.expert_weights == NVFP4 else None
        self.model = read_text_model(self.checkpoint).model_copy(update={"experts_dtype": experts_dtype})
        self.build = BuildConfig(
            target="inductor",
            dtype="bfloat16",
            device=DEVICE,
            max_encode_tokens=options.max_encode_tokens,
            max_sequences=options.max_sequences,
            expert_activations=options.fp8_experts or "full",
            expert_weights="plain" if experts_dtype else options.expert_weights or "packed",
            batch_invariant=options.batch_invariant,
            expert_gpus=options.expert_gpus,
        )
        self.results: dict[str, object] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}

    def note(self, key: str, value: object) -> None:
        self.results[key] = value
        print(f"  {key}: {value}", flush=True)

    # -- What the phases share

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return random_weights(self.model, self.build)

    @cached_property
    def session(self):
        weights, began = self.weights, time.perf_counter()
        session = random_session(
            self.model, self.checkpoint, self.build, weights, compiled=not self.options.uncompiled, report=print
        )
        self.note("compile_s", round(time.perf_counter() - began, 1))
        return session

    @cached_property
    def cache(self):
        most = self.model.max_position_embeddings
        return random_cache(self.session, max_sequences=64, num_tokens=self.options.cached_tokens, max_tokens=most)

    @cached_property
    def loops(self) -> dict[str, CapturedLoop]:
        captures = {"graph": True, "uncaptured": False}
        return {name: CapturedLoop(self.session, self.cache, capture=capture) for name, capture in captures.items()}

    @contextmanager
    def sequences(self, lengths: list[int]) -> Iterator[list[int]]:
        """Slots with so many random tokens in the cache."""
        slots = open_sequences(self.cache, lengths)
        try:
            yield slots
        finally:
            for slot in slots:
                self.cache.close(slot)

    def start(self, loop: CapturedLoop, slots: list[int], sampling: SamplingConfig = FIXED_STEPS) -> None:
        for slot in slots:
            loop.start_canvas(slot, 0, sampling.resolve(DEFAULTS))

    # -- Phases

    def ceilings(self) -> None:
        source, target = torch.randn(2, 1 << 30, device=DEVICE)
        self.note("copy_gb_per_s", round(2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6))
        a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        self.note("bf16_tflops", round(2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9))

    def weights_made(self) -> None:
        self.note("weights_gb", round(sum(tensor.nbytes for tensor in self.weights.values()) / 1e9, 2))

    def compiled(self) -> None:
        _ = self.session
        torch.cuda.empty_cache()

    def check(self) -> None:
        """Replayed steps equal uncaptured ones bit for bit, in a padded bucket; all is finite; what is to be invariant is."""
        states = []
        with self.sequences([700, 1, 130]) as slots:
            for loop in self.loops.values():
                self.start(loop, slots)
                for _ in range(3):
                    loop.step(slots)
                state = [tensor[slots] for tensor in (loop._canvas, loop._argmax, loop._soft_embeds, loop._step)]
                states.append([loop.argmax_canvas(slot) for slot in slots] + state)
        same = states[0][:3] == states[1][:3] and all(map(torch.equal, states[0][3:], states[1][3:]))
        soft = states[0][5]
        self.note("replay_equals_uncaptured", same)
        self.note("finite", bool(soft.isfinite().all()))
        self.note("soft_embeds_rms", round(soft.float().pow(2).mean().sqrt().item(), 4))
        if not (same and self.results["finite"]):
            raise AssertionError("the captured step is wrong; nothing after this means anything")
        if self.build.batch_invariant:
            graph = self.loops["graph"]
            check_batch_invariance(self.session, self.cache, batches=graph.batches, head_rows=graph.head_rows)

    def step(self) -> None:
        """Wall time of `step` as the scheduler calls it, with its copies and its waiting: of one step alone, and of one in a
        row, where the host prepares the next while the device ends the last."""
        times: dict[str, float] = {}
        self.results["step_ms"] = times
        for batch in (1, 4, 16, 32):
            for prefix in (512, 8192, 65536):
                if batch * prefix > self.options.cached_tokens or batch > self.build.max_sequences:
                    continue
                with self.sequences([prefix] * batch) as slots:
                    for name, loop in self.loops.items():
                        self.start(loop, slots)
                        count = 10 if batch * prefix < 100_000 else 3
                        case = f"{name}, batch {batch}, prefix {prefix}"
                        alone = time_steps(loop, slots, count)
                        in_a_row = time_row(loop, slots, 2 * count, partial(self.start, loop, slots))
                        times[case], times[f"{case}, in a row"] = round(alone, 3), round(in_a_row, 3)
                        print(f"  {case}: {alone:.3f} ms, in a row {in_a_row:.3f} ms", flush=True)

    def extras(self) -> None:
        """A step of requests that ask for more than the plain step, after 512 tokens."""
        loop, times = self.loops["graph"], {}
        for batch in (1, 4):
            with self.sequences([512] * batch) as slots:
                for name, extra in EXTRAS.items():
                    self.start(loop, slots, SamplingConfig(**SAMPLING, **extra))
                    times[f"{name}, batch {batch}"] = round(time_steps(loop, slots, 5), 3)
        self.note("extras_ms", times)

    def pieces(self) -> None:
        """What a step is made of, each alone."""
        times: dict[str, float] = {}
        for batch in (1, 4):
            with self.sequences([512] * batch) as slots:
                times |= {name: round(milliseconds(run), 3) for name, run in pieces_of(self.session, self.cache, slots).items()}
        self.note("pieces_ms", times)

    def encode(self) -> None:
        times = {}
        for tokens in (each for each in (256, 2048, 4096, 8192) if each <= self.build.max_encode_tokens):
            with self.sequences([512]) as slots:
                run = self.encode_pass(tokens, slots)
                finite = all(bool(kv.isfinite().all()) for kv in run())
                ms = milliseconds(run)
            times[f"{tokens} tokens"] = round(ms, 3)
            print(f"  encode {tokens} tokens: {ms:.3f} ms, finite {finite}", flush=True)
        self.results["encode_ms"] = times

    def encode_pass(self, tokens: int, slots: list[int]) -> Callable[[], list[torch.Tensor]]:
        """A pass of so many random tokens after the 512 of one sequence."""
        tables, prefix = self.cache.tables(slots), torch.tensor([512], dtype=torch.int32)
        ids = torch.randint(self.model.vocab_size, (tokens,), dtype=torch.int32)
        positions = torch.arange(512, 512 + tokens, dtype=torch.int32)
        starts = torch.tensor([0, tokens], dtype=torch.int32)
        return lambda: self.session.encode(ids, positions, starts, prefix, tables)

    def canvas(self) -> None:
        """One canvas of 48 fixed steps after a prompt of 128 tokens, for 1, 4 and 8 requests, through the scheduler."""
        tokenizer = Tokenizer.from_file(str(CHECKPOINTS / "tiny" / "tokenizer.json"))
        scheduler = Scheduler(self.session, self.cache, self.loops["graph"], tokenizer)
        times = {}
        for requests in (1, 4, 8):
            for _ in range(2):
                outputs = []
                torch.cuda.synchronize()
                started = time.perf_counter()
                for request in range(requests):
                    prompt = [(7 * token + request) % 400 + 5 for token in range(128)]
                    scheduler.add(prompt, FIXED_STEPS.resolve(DEFAULTS), outputs.append)
                while not scheduler.is_idle:
                    scheduler.tick()
                seconds = time.perf_counter() - started
            times[f"{requests} requests"] = round(seconds, 4)
            steps = [output.num_steps for output in outputs]
            print(f"  {requests} requests: {seconds:.4f} s, steps {steps}", flush=True)
        self.results["canvas_s"] = times

    def memory(self) -> None:
        """The most memory that one step of 64 sequences takes beside weights and pages."""
        loop = self.loops["graph"]
        with self.sequences([512] * 64) as slots:
            self.start(loop, slots)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loop.step(slots)
            torch.cuda.synchronize()
            pages = sum(each.nbytes for each in self.cache.pages)
            sizes = {"before": before, "peak": torch.cuda.max_memory_allocated(), "pages": pages}
            sizes["reserved"] = torch.cuda.memory_reserved()
            self.note("memory_gb", {name: round(size / 1e9, 2) for name, size in sizes.items()})
            self.note("step_ms_of_64", round(time_steps(loop, slots, 3), 3))

    def profile(self) -> None:
        """Where the time of a replayed step goes, and that of the longest encode pass, by kernel."""
        loop = self.loops["graph"]
        for batch, prefix in ((1, 512), (4, 8192), (64, 512)):
            if batch > self.build.max_sequences:
                continue
            with self.sequences([prefix] * batch) as slots:
                self.start(loop, slots)
                self.profile_of(f"batch {batch}, prefix {prefix}", lambda slots=slots: loop.step(slots))
        tokens = self.build.max_encode_tokens
        with self.sequences([512]) as slots:
            self.profile_of(f"encode {tokens} tokens", self.encode_pass(tokens, slots))

    def profile_of(self, case: str, run: Callable[[], object]) -> None:
        rows = kernel_times(run)
        print(f"  {case}: {sum(row[2] for row in rows) / 1e3:.3f} ms in kernels")
        for name, count, us in rows[:45]:
            print(f"    {us:9.1f} us  {count:6.1f} x  {name}", flush=True)
        self.results.setdefault("profile_us", {})[case] = rows[:80]

    def transformers(self) -> None:
        from transformers_step import time_transformers

        self.note("transformers_ms", time_transformers(self.checkpoint, self.model, self.weights))


METHODS = dict.fromkeys(PHASES) | {name: name for name in PHASES} | {"weights": "weights_made", "compile": "compiled"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shape = CHECKPOINTS / "diffusiongemma-26B-A4B"
    parser.add_argument("--checkpoint", type=command_line.checkpoint, default=shape, help="only its config.json is read")
    parser.add_argument("--phases", default=",".join(PHASES[:-2]), help=f"of {','.join(PHASES)}")
    parser.add_argument("--profile", action="store_true", help="also the phase profile")
    parser.add_argument("--transformers", action="store_true", help="also the phase transformers")
    parser.add_argument("--fp8-experts", choices=("full", "float8"), help="FP8 expert weights; the activations that they meet")
    parser.add_argument(
        "--expert-weights", choices=("plain", "packed", "int4", NVFP4), help="not FP8 ones; packed, as a build chooses"
    )
    count = partial(parser.add_argument, type=command_line.count)
    count("--max-encode-tokens", default=8192, help="fewer are compiled in less time; %(default)s")
    count("--max-sequences", default=64, help="fewer are compiled in less time; %(default)s")
    count("--cached-tokens", default=CACHED_TOKENS, help="longer prefixes are left out; %(default)s")
    count("--expert-gpus", default=1, help="GPUs that share the experts; %(default)s")
    parser.add_argument("--batch-invariant", action="store_true", help="a batch-invariant build")
    parser.add_argument("--uncompiled", action="store_true", help="the network's modules instead of compiled programs")
    parser.add_argument("--output", type=Path, help="file for the results, written after each phase")
    options = parser.parse_args()
    wanted = {*options.phases.split(","), *(name for name in ("profile", "transformers") if getattr(options, name))}
    if unknown := wanted - set(PHASES):
        parser.error(f"--phases: got {', '.join(sorted(unknown))}, expected some of {', '.join(PHASES)}")
    if options.fp8_experts and options.expert_weights not in (None, "plain"):
        parser.error(f"--expert-weights: got {options.expert_weights}, expected plain with --fp8-experts")
    if options.expert_weights != "plain" and "transformers" in wanted:
        parser.error("phase transformers: it takes the experts as they are, expected --expert-weights plain")

    command_line.need_cuda()
    bench, failed, began = Bench(options), [], time.perf_counter()
    for phase in (phase for phase in PHASES if phase in wanted):
        print(f"[{time.perf_counter() - began:6.1f} s] {phase}", flush=True)
        try:
            getattr(bench, METHODS[phase])()
        except Exception:  # a phase that fails must not take the others' figures with it
            traceback.print_exc()
            failed.append(phase)
        bench.results["failed"] = failed
        if options.output:
            options.output.write_text(json.dumps(bench.results, indent=1))
        if phase in failed and phase in ("weights", "compile"):  # the others would only try again
            break
    print(f"[{time.perf_counter() - began:6.1f} s] done", flush=True)
    print(json.dumps({"benchmark": "step", **bench.results}))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
