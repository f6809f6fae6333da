"""Writes `small`, a checkpoint of 239 million parameters with random weights.

It is large enough that a step is bound by arithmetic and memory instead of calls, small enough for a laptop. Never committed:
it is made again from its seed.

    python benchmarks/small_checkpoint.py build/benchmarks/small

Eight layers of the family's kind (five sliding, then a full one), hidden 512, 128 experts of width 128 of which 8 are chosen,
vocabulary 32,768, canvas 256, float32. The weights are tamed as those of the tests are, so that two correct implementations
give the same tokens.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small_checkpoints import random_checkpoint  # noqa: E402

SMALL = {
    "vocab_size": 32_768,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_experts": 128,
    "top_k_experts": 8,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 1,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 1024,
    "max_position_embeddings": 32_768,
    "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention", "full_attention"],
}
CANVAS_LENGTH = 256
FILES = frozenset(("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"))
"""What is written."""
# What is small for tests is chaotic here: with 128 experts, 256 rows and 8 layers some row is always so near to another
# expert that a rounding decides, and what it decides spreads to all rows. So that two correct implementations give the same
# tokens, the random weights are scaled once more: experts that matter less (by their norm) and are chosen more clearly, and a
# quieter path from step to step. Work and memory are those of any weights. Measured over four steps of one canvas: 163 of 256
# tokens differ from transformers' without, none with.
TAMED = {
    "embed_tokens.weight": 0.3,
    "decoder.self_conditioning.down_proj.weight": 0.02,
    "router.proj.weight": 40.0,
    "post_feedforward_layernorm_2.weight": 0.005,
}


def make_small_checkpoint(directory: Path, *, seed: int = 0, canvas_length: int = CANVAS_LENGTH, **text) -> Path:
    """Writes the checkpoint into `directory`, whole or not at all; `text` replaces sizes of its text model.

    Raises ValueError for a directory with other files than such a checkpoint's.
    """
    sizes, directory = SMALL | text, directory.resolve()
    if directory.exists() and (not directory.is_dir() or {each.name for each in directory.iterdir()} - FILES):
        raise ValueError(f"{directory}: there is something else, expected a new name or such a checkpoint; choose another")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        random_checkpoint(staging, seed=seed, canvas_length=canvas_length, **sizes)
        tame(staging / "model.safetensors")
        widen_vocabulary(staging / "tokenizer.json", sizes["vocab_size"])
        shutil.rmtree(directory, ignore_errors=True)
        staging.chmod(0o755)
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def tame(path: Path) -> None:
    """Scales what `TAMED` names, and rounds it to bfloat16 as the other weights are."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        for ending, factor in TAMED.items():
            if name.endswith(ending):
                tensors[name] = (tensor * factor).bfloat16().to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})


def widen_vocabulary(path: Path, vocab_size: int) -> None:
    """Gives every token id of the model a text of its own; no text is read as one of the new tokens."""
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"▁{token}": token for token in range(len(vocab), vocab_size)}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started_s = time.perf_counter()
    try:
        make_small_checkpoint(options.directory, seed=options.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    size_bytes = (options.directory / "model.safetensors").stat().st_size
    print(f"{options.directory}: {size_bytes / 1e9:.2f} GB, {time.perf_counter() - started_s:.0f} s")


if __name__ == "__main__":
    main()
