"""Bytes a sequence on the CPU: peak memory with 1, 16 and 64 active sequences, real vocabulary (262,144) and canvas (256).

Each count is measured in a process of its own: the high-water mark of its resident memory. Between two counts may lie the KV
pages that the sequences use, and 2 MB a sequence (keeping probabilities would take 268 MB). Checked: all of them were active
at once. The checkpoint is random, made from a seed: few small layers, run uncompiled. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import command_line
from measuring import Goal, Report, refuse
from resident_memory import peak_bytes

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small_checkpoints import network_session, random_checkpoint  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from backend.engine import Engine, EngineLimits  # noqa: E402
from backend.generation_defaults import GenerationDefaults  # noqa: E402
from backend.sampling_config import SamplingConfig  # noqa: E402

ALLOWED_BYTES_PER_SEQUENCE = 2_000_000
CANVAS_LENGTH = 256
PASS_ROWS = 2048  # of a denoising pass on the CPU: more sequences take more passes
SHAPE = {
    "vocab_size": 262_144,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 1024,
    "max_position_embeddings": 8192,
}


def measure(checkpoint: Path, num_sequences: int, prompt_tokens: int, steps: int) -> dict[str, int]:
    """Runs `num_sequences` at once, one canvas each, `steps` denoising steps; one of them samples, the others are greedy (noise
    for all of them takes minutes and the same memory)."""
    session = network_session(checkpoint)
    engine = Engine(
        session,
        Tokenizer.from_file(str(checkpoint / "tokenizer.json")),
        GenerationDefaults.from_json({"eos_token_id": []}),
        EngineLimits(max_sequences=64, max_cached_tokens=64 * 2048),
    )
    ended: list = []
    for seed in range(num_sequences):
        sampling = SamplingConfig(seed=seed, max_tokens=256, max_denoising_steps=steps, temperature=float(seed == 0))
        prompt = [seed, *range(100, 100 + prompt_tokens - 1)]
        engine.scheduler.add(prompt, sampling.resolve(engine.defaults), ended.append)
    started, most_active, pages = time.perf_counter(), 0, {}
    while not engine.scheduler.is_idle:
        before = len(ended)
        engine.scheduler.tick()
        gauges = {(series.name, series.label_value): value for series, value in engine.scheduler.metrics.drain().gauges.items()}
        most_active = max(most_active, gauges["active_requests", ""] + len(ended) - before)
        for kind in engine.plan.num_pages:
            held = gauges["kv_pages_used", kind] + gauges["kv_pages_cached", kind]
            pages[kind] = max(pages.get(kind, 0), held)
    return {
        "sequences": num_sequences,
        "most_active": int(most_active),
        "peak_bytes": peak_bytes(),
        "kv_bytes": int(sum(count * engine.plan.page_bytes[kind] for kind, count in pages.items())),
        "seconds": round(time.perf_counter() - started),
        "planned_bytes": engine.plan.total_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=command_line.count, nargs="+", default=(1, 16, 64))
    parser.add_argument("--prompt-tokens", type=command_line.count, default=64)
    parser.add_argument("--steps", type=command_line.count, default=1)
    parser.add_argument("--vocab-size", type=command_line.count, default=SHAPE["vocab_size"])
    parser.add_argument("--measure", nargs=2, metavar=("CHECKPOINT", "SEQUENCES"), help="one count, in this process")
    options = parser.parse_args()
    if options.measure:
        checkpoint, count = options.measure
        print(json.dumps(measure(Path(checkpoint), int(count), options.prompt_tokens, options.steps)))
        return
    report = Report(benchmark="memory")
    with tempfile.TemporaryDirectory() as directory:
        shape = SHAPE | {"vocab_size": options.vocab_size}
        checkpoint = random_checkpoint(Path(directory), seed=1, canvas_length=CANVAS_LENGTH, **shape)
        results = []
        for count in options.counts:
            passed_on = ["--prompt-tokens", str(options.prompt_tokens), "--steps", str(options.steps)]
            command = [sys.executable, __file__, "--measure", str(checkpoint), str(count), *passed_on]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            if results[-1]["most_active"] != count:
                refuse(f"{count} sequences: at most {results[-1]['most_active']} were active at once")
    for result in results:
        report.add("peak memory", f"{result['sequences']} sequences", result["peak_bytes"] / 1e6, "MB")
        report.add("KV pages in use", f"{result['sequences']} sequences", result["kv_bytes"] / 1e6, "MB")
    for few, many in pairwise(results):
        grown = many["peak_bytes"] - few["peak_bytes"] - (many["kv_bytes"] - few["kv_bytes"])
        each = grown / (many["sequences"] - few["sequences"])
        case = f"a sequence more, {few['sequences']} to {many['sequences']}, beyond its KV pages"
        report.add(case, "this engine", each / 1e6, "MB")
        if few["sequences"] * CANVAS_LENGTH >= PASS_ROWS:  # else the workspace grows, up to that of a full pass
            goal = {"value": round(each / 1e6, 3), "limit": ALLOWED_BYTES_PER_SEQUENCE / 1e6, "unit": "MB"}
            report.goals.append(Goal(what=case, **goal))
    report.finish()


if __name__ == "__main__":
    main()
