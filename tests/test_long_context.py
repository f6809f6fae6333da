"""262,144 tokens, the real model's positions: chunks, windows, page tables, the prefix cache and the canvas at their end.

Attention of a full layer over all of them takes minutes, so it is left out where nothing depends on it: a model's last layer
makes keys and values and no more while a prompt is encoded. With a sliding layer before it, a prompt takes time in proportion
to its length, and transformers, too, can encode it in blocks that begin a window early. Layers that are not the last see random
keys and values, written to both caches.
"""

from pathlib import Path

import pytest
import torch
from oracles import Oracle
from small_checkpoints import network_session, random_checkpoint
from tokenizers import Tokenizer
from tolerances import assert_close
from transformers import DiffusionGemmaConfig, DynamicCache
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextRotaryEmbedding

from backend.canvas_loop import CanvasLoop
from backend.errors import RequestError
from backend.generation_defaults import GenerationDefaults
from backend.kv_cache import PagedKVCache
from backend.noise import initial_canvas
from backend.planner import EngineLimits, plan_memory
from backend.sampler import soft_cap
from backend.sampling_config import SamplingConfig
from backend.scheduler import Scheduler
from builder.config import read_model_config
from builder.network import rope_frequencies, rotation

POSITIONS, CANVAS, WINDOW, BLOCK = 262_144, 16, 64, 1024
PROMPT = POSITIONS - CANVAS
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 2,
    "top_k_experts": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "max_position_embeddings": POSITIONS,
}
SHAPE_26B = Path(__file__).parent.parent / "checkpoints" / "diffusiongemma-26B-A4B"
DEFAULTS = GenerationDefaults.from_json({"max_denoising_steps": 2, "eos_token_id": []})


def cache_of(session, limits: EngineLimits) -> PagedKVCache:
    plan, model = plan_memory(session.manifest, limits), session.manifest.model
    cache = PagedKVCache(
        model,
        page_size=session.manifest.build.page_size,
        num_pages=plan.num_pages,
        max_sequences=limits.max_sequences,
        max_tokens=model.max_position_embeddings,
        dtype=session.dtype,
        device=session.device,
    )
    session.bind_pages(cache.pages)
    return cache


def logits_of(session, cache, slot: int, canvas: torch.Tensor) -> torch.Tensor:
    """Of the first denoising step: [C, V]."""
    soft_embeds = torch.zeros(1, CANVAS, session.manifest.model.hidden_size)
    length = torch.tensor([cache.length[slot]], dtype=torch.int32)
    hidden = session.denoise(canvas.int().unsqueeze(0), soft_embeds, length, cache.tables([slot]))
    return soft_cap(session.head(hidden[0]), session.manifest.model.final_logit_softcapping)


# -- A whole prompt


@torch.no_grad()
def encoded_in_blocks(oracle: Oracle, prompt: list[int]) -> DynamicCache:
    """transformers' cache after the prompt, of a model with one sliding layer below one full layer."""
    config = oracle.model.config.get_text_config()
    parts = []
    for start in range(0, len(prompt), BLOCK):
        begin = max(0, start - WINDOW)  # what the sliding layer sees of the tokens before
        tokens = prompt[begin : start + BLOCK]
        block = DynamicCache(config=config)
        oracle.model.model.encoder(
            input_ids=torch.tensor([tokens]),
            cache=block,
            position_ids=torch.arange(begin, begin + len(tokens)).unsqueeze(0),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.bool),
        )
        parts.append((block.layers[1].keys[:, :, start - begin :], block.layers[1].values[:, :, start - begin :]))
    cache = DynamicCache(config=config)
    window = block.layers[0]
    missing = (0, 0, len(prompt) - window.keys.shape[2], 0)  # which the sliding layer has given up
    cache.update(torch.nn.functional.pad(window.keys, missing), torch.nn.functional.pad(window.values, missing), 0)
    cache.update(*(torch.cat(each, dim=2) for each in zip(*parts, strict=True)), 1)
    return cache


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    layer_types = ["sliding_attention", "full_attention"]
    return random_checkpoint(tmp_path_factory.mktemp("long"), num_hidden_layers=2, layer_types=layer_types, **SHAPE)


def test_a_prompt_up_to_the_last_canvas(checkpoint):
    """Through the scheduler's chunks: every key and value, the logits at positions up to 262,143, and what a second request
    finds in the prefix cache."""
    session = network_session(checkpoint, traced={"encode"})
    cache = cache_of(session, EngineLimits(max_sequences=1, max_cached_tokens=POSITIONS))
    loop = CanvasLoop(session, cache)
    scheduler = Scheduler(session, cache, loop, Tokenizer.from_file(str(checkpoint / "tokenizer.json")))
    prompt = torch.randint(20, 97, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    sampling = SamplingConfig(seed=5, max_tokens=CANVAS, temperature=0.0).resolve(DEFAULTS)
    with pytest.raises(RequestError, match=f"got {PROMPT + 1} tokens .* expected at most {POSITIONS} in all"):
        scheduler.check([*prompt, 20], sampling)
    scheduler.check(prompt, sampling)
    outputs = []
    job = scheduler.add(prompt, sampling, outputs.append)
    num_ticks = 0
    while not scheduler.num_active or job.is_encoding:
        scheduler.tick()
        num_ticks += 1
    assert num_ticks == -(-PROMPT // session.manifest.build.max_encode_tokens)
    assert cache.length[job.slot] == PROMPT and cache.num_pages_used["full_attention"] == PROMPT // 32 + 1

    oracle = Oracle(checkpoint)
    theirs = encoded_in_blocks(oracle, prompt)
    for layer, (kind, table) in enumerate(sorted(cache.tables([job.slot]).items(), reverse=True)):
        assert session.manifest.model.layer_types[layer] == kind
        kept = {"sliding_attention": WINDOW - 1, "full_attention": PROMPT}[kind]
        positions = torch.arange(PROMPT - kept, PROMPT)
        ours = cache.pages[layer][table[0].long()[positions // 32], positions % 32]
        for which, each in enumerate((theirs.layers[layer].keys, theirs.layers[layer].values)):
            assert_close(ours[:, which], each[0, :, -kept:].transpose(0, 1), torch.float32)

    canvas = initial_canvas(seed=5, canvas_index=0, canvas_length=CANVAS, vocab_size=97)
    expected = oracle.logits(theirs, canvas, None)
    assert_close(logits_of(session, cache, job.slot, canvas), expected, torch.float32)
    assert loop.argmax_canvas(job.slot) == expected.argmax(-1).tolist()

    while not scheduler.is_idle:
        scheduler.tick()
    again = []
    scheduler.metrics.drain()
    scheduler.add(prompt, sampling, again.append)
    scheduler.tick()
    counted = {series.name: value for series, value in scheduler.metrics.drain().counters.items()}
    assert counted["prefix_cache_hit_tokens_total"] == PROMPT // 32 * 32
    while not scheduler.is_idle:
        scheduler.tick()
    assert [output.token_ids for output in again] == [output.token_ids for output in outputs]
    assert sum(len(output.token_ids) for output in again) == CANVAS


# -- Layers of every kind behind a long prefix


def test_a_commit_and_a_canvas_behind_random_keys_and_values(tmp_path):
    """Full layers that others depend on, over pages that two sequences took in turns."""
    layer_types = ["full_attention", "sliding_attention", "full_attention"]
    checkpoint = random_checkpoint(tmp_path, num_hidden_layers=3, layer_types=layer_types, feedback=1.0, **SHAPE)
    session, oracle = network_session(checkpoint), Oracle(checkpoint)
    cache = cache_of(session, EngineLimits(max_sequences=2, max_cached_tokens=POSITIONS + 4096))
    prefix, chunk, generator = POSITIONS - 2 * CANVAS, 8192, torch.Generator().manual_seed(3)
    attention = [session.manifest.model.attention[kind] for kind in layer_types]
    kv = [torch.randn(prefix, 2, each.num_kv_heads, each.head_dim, generator=generator) for each in attention]
    slot, other = cache.open(POSITIONS), cache.open(4096)
    for start in range(0, prefix, chunk):
        new = [layer[start : start + chunk] for layer in kv]
        cache.append([slot], [len(new[0])], new)
        cache.append([other], [37], [torch.full_like(layer[:37], float("nan")) for layer in kv])
    theirs = DynamicCache(config=oracle.model.config.get_text_config())
    for layer, each in enumerate(kv):
        theirs.update(*(each[:, which].transpose(0, 1).unsqueeze(0) for which in (0, 1)), layer)

    committed = torch.randint(97, (CANVAS,), generator=generator)
    new_kv = session.encode(
        committed.int(),
        torch.arange(prefix, prefix + CANVAS, dtype=torch.int32),
        torch.tensor([0, CANVAS], dtype=torch.int32),
        torch.tensor([prefix], dtype=torch.int32),
        cache.tables([slot]),
    )
    cache.append([slot], [CANVAS], new_kv)
    with torch.no_grad():
        oracle.model.model.encoder(
            input_ids=committed.unsqueeze(0),
            cache=theirs,
            position_ids=torch.arange(prefix, prefix + CANVAS).unsqueeze(0),
            attention_mask=torch.ones(1, prefix + CANVAS, dtype=torch.bool),
        )
    for ours, layer in zip(new_kv, theirs.layers, strict=True):
        assert_close(ours[:, 0], layer.keys[0, :, -CANVAS:].transpose(0, 1), torch.float32)
        assert_close(ours[:, 1], layer.values[0, :, -CANVAS:].transpose(0, 1), torch.float32)
    canvas = torch.randint(97, (CANVAS,), generator=generator)
    assert_close(logits_of(session, cache, slot, canvas), oracle.logits(theirs, canvas, None), torch.float32)


# -- Positions


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_rotations_equal_transformers_at_every_position(kind):
    """To the bit, with the real model's frequencies: float32 holds every position, and both round its angles alike."""
    attention = read_model_config(SHAPE_26B).attention[kind]
    config = DiffusionGemmaConfig.from_pretrained(SHAPE_26B).get_text_config()
    positions = torch.arange(POSITIONS - 1, -1, -5, dtype=torch.int32)
    cos, sin = rotation(positions, rope_frequencies(attention), torch.float32)
    theirs = DiffusionGemmaTextRotaryEmbedding(config)(torch.zeros(1), positions.unsqueeze(0), kind)
    assert torch.equal(cos[:, 0], theirs[0][0]) and torch.equal(sin[:, 0], theirs[1][0])
