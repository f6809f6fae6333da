"""Peak memory with 64 active sequences against 4, at the real vocabulary (262,144) and canvas (256), on the CPU.

Each count is measured in a process of its own: the high-water mark of its resident memory. Between the two may lie the KV pages
that the sequences use, and 2 MB a sequence. The checkpoint is random, made from a seed: few small layers, run uncompiled. The
last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small_checkpoints import network_session, random_checkpoint  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from backend.engine import Engine, EngineLimits  # noqa: E402
from backend.generation_defaults import GenerationDefaults  # noqa: E402
from backend.sampling_config import SamplingConfig  # noqa: E402

ALLOWED_BYTES_PER_SEQUENCE = 2_000_000
SHAPE = {
    "vocab_size": 262_144,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 1024,
    "max_position_embeddings": 8192,
}


def peak_bytes() -> int:
    """The high-water mark of this process's resident memory."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


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
    for seed in range(num_sequences):
        sampling = SamplingConfig(seed=seed, max_tokens=256, max_denoising_steps=steps, temperature=float(seed == 0))
        prompt = [seed, *range(1000, 1000 + prompt_tokens - 1)]
        engine.scheduler.add(prompt, sampling.resolve(engine.defaults), lambda output: None)
    started, most_active, pages = time.perf_counter(), 0, {}
    while not engine.scheduler.is_idle:
        engine.scheduler.tick()
        gauges = {(series.name, series.label_value): value for series, value in engine.scheduler.metrics.drain().gauges.items()}
        most_active = max(most_active, gauges["active_requests", ""])
        for kind in engine.plan.num_pages:
            held = gauges["kv_pages_used", kind] + gauges["kv_pages_cached", kind]
            pages[kind] = max(pages.get(kind, 0), held)
    return {
        "sequences": num_sequences,
        "peak_bytes": peak_bytes(),
        "kv_bytes": int(sum(count * engine.plan.page_bytes[kind] for kind, count in pages.items())),
        "seconds": round(time.perf_counter() - started),
        "planned_bytes": engine.plan.total_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs=2, default=(4, 64))
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--measure", nargs=2, metavar=("CHECKPOINT", "SEQUENCES"), help="one count, in this process")
    options = parser.parse_args()
    if options.measure:
        checkpoint, count = options.measure
        print(json.dumps(measure(Path(checkpoint), int(count), options.prompt_tokens, options.steps)))
        return
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = random_checkpoint(Path(directory), seed=1, canvas_length=256, **SHAPE)
        results = []
        for count in options.counts:
            passed_on = ["--prompt-tokens", str(options.prompt_tokens), "--steps", str(options.steps)]
            command = [sys.executable, __file__, "--measure", str(checkpoint), str(count), *passed_on]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(", ".join(f"{name} {value:,}" for name, value in results[-1].items()), flush=True)
    few, many = results
    grown = many["peak_bytes"] - few["peak_bytes"]
    beyond_kv = (grown - (many["kv_bytes"] - few["kv_bytes"])) / (many["sequences"] - few["sequences"])
    print(f"a sequence more takes {beyond_kv / 1e6:.2f} MB beyond its KV pages (at most 2)")
    print(json.dumps({"benchmark": "memory", "results": results, "bytes_per_sequence_beyond_kv": round(beyond_kv)}))
    if beyond_kv > ALLOWED_BYTES_PER_SEQUENCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
