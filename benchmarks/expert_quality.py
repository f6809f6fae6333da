"""What experts in FP8 and in 4 bits do to the tiny checkpoint's answers: exact-answer rate and denoising steps a canvas.

Held-out questions through the network's own modules on the CPU, in bfloat16; every system gets the same prompts and seeds. The
last line is JSON.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import command_line
from random_model import read_text_model, uncompiled
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from backend import LLM, SamplingConfig
from backend.engine import Engine, EngineLimits
from backend.generation_defaults import GenerationDefaults
from backend.session import Session
from backend.weights import bind_weights
from builder.description import describe
from builder.export import signatures
from builder.quantize import quantize_checkpoint
from builder.weights import text_weights
from contract.checkpoint import Checkpoint
from contract.manifest import BuildConfig, Program

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
sys.path.insert(0, str(CHECKPOINTS))

from tiny_tasks import Question, questions  # noqa: E402


def offline(checkpoint: Path, **choices: str) -> LLM:
    """The checkpoint, its programs not compiled."""
    model, build = read_text_model(checkpoint), BuildConfig(target="inductor", dtype="bfloat16", **choices)
    manifest = describe(model, build, Checkpoint(checkpoint), text_weights(model), checkpoint, checkpoint)
    traced = signatures(model, build)
    programs = {each.name: Program(file="", inputs=each.inputs, weights=each.weights, outputs=()) for each in traced}
    manifest = manifest.model_copy(update={"programs": programs})
    runners = {each.name: uncompiled(each, build) for each in traced}
    session = Session(manifest, runners, bind_weights(manifest, checkpoint, checkpoint))
    defaults = GenerationDefaults.from_json(checkpoint / "generation_config.json")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return LLM.from_engine(Engine(session, tokenizer, defaults, EngineLimits(max_sequences=32)))


def answer(llm: LLM, asked: list[Question], prompts: list[str]) -> dict[str, float]:
    sampling = [SamplingConfig(max_tokens=160, skip_special_tokens=False, seed=seed) for seed in range(len(asked))]
    began = time.monotonic()
    results = llm.generate(prompts, sampling)
    steps = [count for result in results for count in result.num_steps]
    right = sum(result.text == question.answer for result, question in zip(results, asked, strict=True))
    return {
        "right": right,
        "of": len(asked),
        "steps_a_canvas": round(sum(steps) / len(steps), 3),
        "canvases": len(steps),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=command_line.checkpoint, default=CHECKPOINTS / "tiny", help="in full precision; %(default)s"
    )
    parser.add_argument("--questions", type=command_line.count, default=200, help="%(default)s")
    options = parser.parse_args()
    asked = list(itertools.islice(questions(2026, held_out=True), options.questions))
    template = AutoTokenizer.from_pretrained(options.checkpoint)
    prompts = [
        template.apply_chat_template(
            each.messages, tools=each.tools, enable_thinking=each.enable_thinking, add_generation_prompt=True, tokenize=False
        )
        for each in asked
    ]
    table, console = Table("experts", "right", "steps a canvas", "canvases"), Console()
    records = {}
    with tempfile.TemporaryDirectory() as directory:
        quantized = Path(directory) / "quantized"
        errors = quantize_checkpoint(options.checkpoint, quantized)
        for name, checkpoint, choices in (
            ("bfloat16", options.checkpoint, {}),
            ("FP8, full rows", quantized, {}),
            ("FP8, FP8 rows", quantized, {"expert_activations": "float8"}),
            ("4 bits", options.checkpoint, {"expert_weights": "int4"}),
        ):
            record = records[name] = answer(offline(checkpoint, **choices), asked, prompts)
            table.add_row(name, f"{record['right']} of {record['of']}", str(record["steps_a_canvas"]), str(record["canvases"]))
    console.print(table)
    weights = {layer: {name: round(error, 5) for name, error in each.items()} for layer, each in errors.items()}
    print(json.dumps({"benchmark": "expert_quality", "weight_error": weights, "results": records}))


if __name__ == "__main__":
    main()
