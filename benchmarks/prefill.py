"""Prefill: tokens a second of encoding a prompt, against transformers' encoder, same checkpoint, dtype and threads.

    python benchmarks/prefill.py --checkpoint checkpoints/tiny --engine engines/diffusiongemma

The keys of the last layer, which depend on everything before, are compared first. Ours runs in passes of the engine's
`max_encode_tokens`, as it does for requests; transformers runs the whole prompt at once. The last line is JSON.
"""

import argparse

import command_line
import torch
from measuring import Report, in_turns, refuse
from random_model import random_cache
from transformers import DynamicCache
from transformers_generation import Transformers

from backend.encode_pass import NewTokens, encode_new_tokens
from backend.kv_cache import PagedKVCache
from backend.session import Session

OURS, THEIRS = "this engine", "transformers"
# Two correct implementations; in a prompt of thousands of tokens some row takes another expert because of a rounding.
LARGEST_ERROR = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=command_line.checkpoint, required=True)
    parser.add_argument("--engine", type=command_line.engine, required=True)
    parser.add_argument(
        "--lengths",
        type=command_line.count,
        nargs="+",
        default=(128, 1024, 8192),
        help="each takes one round less than the last",
    )
    parser.add_argument("--rounds", type=command_line.count, default=3)
    options = parser.parse_args()
    session, other = Session.load(options.engine), Transformers(options.checkpoint)
    model = session.manifest.model
    if session.dtype != torch.float32:
        refuse(f"{options.engine} is a {session.manifest.build.dtype} engine, and only float32 is compared")
    report = Report(benchmark=f"prefill, {options.checkpoint.name}")
    report.notes.append(f"transformers' experts, ms of a forward pass: {other.choose_experts()}; the fastest is used")
    for index, length in enumerate(options.lengths):
        if length > model.max_position_embeddings:
            report.notes.append(f"{length} tokens: left out, the model has {model.max_position_embeddings} positions")
            continue
        cache = random_cache(session, max_sequences=1, num_tokens=length, max_tokens=length)
        prompt = torch.randint(5, 400, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        ours, theirs = encode(session, cache, prompt), last_keys(other, prompt)
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error <= LARGEST_ERROR:
            refuse(f"{length} tokens: keys of the last layer differ from transformers' by {error:.2g} of their norm")
        systems = {THEIRS: lambda prompt=prompt: last_keys(other, prompt)}
        systems |= {OURS: lambda prompt=prompt, cache=cache: encode(session, cache, prompt)}
        for name, timing in in_turns(systems, max(1, options.rounds - index), doing=f"{length} tokens").items():
            report.add(f"{length} tokens", name, length / timing.median_s, "tokens/s", timing)
    report.finish()


@torch.no_grad()
def encode(session: Session, cache: PagedKVCache, prompt: list[int]) -> torch.Tensor:
    """Keys of the last layer after encoding `prompt`, [T, K, head_dim]."""
    slot, most = cache.open(len(prompt)), session.manifest.build.max_encode_tokens
    for begin in range(0, len(prompt), most):
        new_tokens = NewTokens(slot=slot, token_ids=prompt[begin : begin + most], page_keys=())
        encode_new_tokens(session, cache, [new_tokens], keep_pages=False)
    table = cache.tables([slot])[session.manifest.model.layer_types[-1]][0].long()
    keys = cache.pages[-1].index_select(0, table)[:, :, 0].flatten(0, 1)[: len(prompt)]
    cache.close(slot)
    return keys


@torch.no_grad()
def last_keys(other: Transformers, prompt: list[int]) -> torch.Tensor:
    """The same, by transformers."""
    cache = DynamicCache(config=other.model.config.get_text_config())
    other.model.model.encoder(
        input_ids=torch.tensor([prompt]),
        cache=cache,
        position_ids=torch.arange(len(prompt)).unsqueeze(0),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.bool),
    )
    return cache.layers[-1].keys[0].transpose(0, 1)


if __name__ == "__main__":
    main()
