"""Proof ladder, rung 3: one encode, one denoise and one commit against transformers, with fixed inputs."""

import pytest
import torch
from oracles import Oracle
from small_checkpoints import network_session, random_checkpoint
from tolerances import assert_as_exact, assert_close

from backend.captured_step import NewInputs
from backend.kv_cache import PagedKVCache
from backend.planner import pages_needed
from backend.sampler import soft_cap, soft_embeddings

SHAPES = {
    "sliding and full": {},
    "all full": {"layer_types": ["full_attention"] * 3},
    "alternating, wide heads": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "global_head_dim": 64,
    },
    "many experts, grouped keys": {"num_experts": 32, "num_attention_heads": 8, "num_key_value_heads": 4},
    "every expert": {"num_experts": 8, "moe_intermediate_size": 8},
    "small window": {"sliding_window": 5},
}


class Passes:
    """Our programs and pages, one pass at a time."""

    def __init__(self, session):
        model = session.manifest.model
        self.session, self.model = session, model
        self.cache = PagedKVCache(
            model,
            page_size=session.manifest.build.page_size,
            num_pages=dict.fromkeys(model.attention, 64),
            max_sequences=1,
            max_tokens=512,
            dtype=session.dtype,
            device=session.device,
        )
        session.bind_pages(self.cache.pages)
        self.slot = self.cache.open(256)

    def encode(self, tokens: list[int]) -> list[torch.Tensor]:
        start = self.cache.length[self.slot]
        new_kv = self.session.encode(
            torch.tensor(tokens, dtype=torch.int32),
            torch.arange(start, start + len(tokens), dtype=torch.int32),
            torch.tensor([0, len(tokens)], dtype=torch.int32),
            torch.tensor([start], dtype=torch.int32),
            self.cache.tables([self.slot]),
        )
        self.cache.append([self.slot], [len(tokens)], new_kv)
        return new_kv

    def logits(self, canvas: torch.Tensor, previous: torch.Tensor | None) -> torch.Tensor:
        length, hidden_size = canvas.numel(), self.model.hidden_size
        soft = torch.zeros(length, hidden_size, dtype=self.session.dtype)
        if previous is not None:
            soft = soft_embeddings(previous, self.session.embedding, hidden_size**0.5, self.session.dtype)
        prefix = torch.tensor([self.cache.length[self.slot]], dtype=torch.int32)
        hidden = self.session.denoise(canvas.int().unsqueeze(0), soft.unsqueeze(0), prefix, self.cache.tables([self.slot]))
        return soft_cap(self.session.head(hidden[0]), self.model.final_logit_softcapping)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def passes_of(checkpoint, dtype: str) -> Passes:
    return Passes(network_session(checkpoint, dtype=dtype, page_size=8))


def kept(cache, new_kv) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (ours, transformers') of keys and of values [tokens, K, head_dim]: the last ones, which its sliding layers keep."""
    pairs = []
    for layer, kv in zip(cache.layers, new_kv, strict=True):
        count = min(kv.shape[0], layer.keys.shape[2])
        for ours, theirs in ((kv[:, 0], layer.keys), (kv[:, 1], layer.values)):
            pairs.append((ours[-count:], theirs[0, :, -count:].transpose(0, 1)))
    return pairs


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_equals_transformers(shape, tmp_path):
    """Keys and values of a prompt and of a committed canvas; logits of two denoising steps after them."""
    checkpoint = random_checkpoint(tmp_path, feedback=1.0, **SHAPES[shape])
    oracle, passes = Oracle(checkpoint), passes_of(checkpoint, "float32")
    chunks = []
    for chunk in (tokens(41, seed=1), tokens(16, seed=2)):
        chunks.append(chunk)
        cache = oracle.encode(*chunks)
        for ours, theirs in kept(cache, passes.encode(chunk)):
            assert_close(ours, theirs, torch.float32)
        canvas = torch.tensor(tokens(16, seed=3))
        first = oracle.logits(cache, canvas, None)
        assert_close(passes.logits(canvas, None), first, torch.float32)
        assert_close(passes.logits(canvas, first / 0.7), oracle.logits(cache, canvas, first / 0.7), torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_as_exact_as_transformers(shape, tmp_path):
    checkpoint = random_checkpoint(tmp_path, feedback=1.0, **SHAPES[shape])
    exact, oracle, passes = Oracle(checkpoint), Oracle(checkpoint, torch.bfloat16), passes_of(checkpoint, "bfloat16")
    prompt, canvas = tokens(41, seed=1), torch.tensor(tokens(16, seed=3))
    exact_cache, cache, new_kv = exact.encode(prompt), oracle.encode(prompt), passes.encode(prompt)
    for (_, truth), (ours, theirs) in zip(kept(exact_cache, new_kv), kept(cache, new_kv), strict=True):
        assert_as_exact(ours, theirs, truth)
    first = exact.logits(exact_cache, canvas, None)
    for previous in (None, first / 0.7):
        truth = exact.logits(exact_cache, canvas, previous)
        assert_as_exact(passes.logits(canvas, previous), oracle.logits(cache, canvas, previous), truth)


@pytest.mark.parametrize("chunk", [1, 7, 8, 24, 40])
def test_a_prompt_encoded_in_chunks_gives_the_same_logits(chunk, tmp_path):
    checkpoint = random_checkpoint(tmp_path, feedback=1.0)
    session = network_session(checkpoint, page_size=8)
    prompt, canvas = tokens(61, seed=4), torch.tensor(tokens(16, seed=5))
    whole, chunked = Passes(session), Passes(session)
    session.bind_pages(whole.cache.pages)
    whole.encode(prompt)
    expected = whole.logits(canvas, None)
    session.bind_pages(chunked.cache.pages)
    for start in range(0, len(prompt), chunk):
        chunked.encode(prompt[start : start + chunk])
    assert_close(chunked.logits(canvas, None), expected, torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [16, 5])
def test_a_mixed_pass_gives_what_encode_and_then_denoise_give(count, dtype, tmp_path):
    """Bit for bit: hidden states, and what is in the pages. Of the canvases one sees the new tokens, whose layers' scalars are
    others. Pages are as few as the sequences may have, so that some of the new tokens take the places of old ones, which only
    they still see."""
    session = network_session(random_checkpoint(tmp_path, feedback=1.0), dtype=dtype, page_size=8, mixed=True)
    model, int32 = session.manifest.model, {"dtype": torch.int32}
    generator = torch.Generator().manual_seed(0)
    kept = {kind: each.window - 1 if each.window else None for kind, each in model.attention.items()}

    def sequences() -> tuple[PagedKVCache, list[int]]:
        cache = PagedKVCache(
            model,
            page_size=8,
            num_pages={kind: 2 * count for kind, count in pages_needed(64, 8, kept).items()},
            max_sequences=3,
            max_tokens=128,
            dtype=session.dtype,
            device=session.device,
        )
        slots = [cache.open(64) for _ in range(2)]
        generator.manual_seed(0)
        for slot, length in zip(slots, (37, 9), strict=True):
            rows = [torch.randn(length, *pages.shape[2:], generator=generator).to(session.dtype) for pages in cache.pages]
            cache.append([slot], [length], rows)
        session.bind_pages(cache.pages)
        return cache, slots

    filled = tokens(16, seed=1)
    canvases = (
        torch.tensor(tokens(32, seed=2), **int32).view(2, 16),
        torch.randn(2, 16, model.hidden_size, generator=generator).to(session.dtype),
        torch.tensor([37 + count, 9], **int32),
    )
    apart, slots = sequences()
    packed = (torch.tensor(filled, **int32), torch.arange(37, 53, **int32), torch.tensor([0, 16], **int32))
    new_kv = session.encode(*packed, torch.tensor([37], **int32), apart.tables(slots[:1]))
    apart.append(slots[:1], [count], new_kv)
    expected = session.denoise(*canvases, apart.tables(slots))

    mixed, slots = sequences()
    new = NewInputs.of(tuple(model.attention), 16, 2, session.device)
    seen = mixed._owned[slots[0]]["sliding_attention"].copy()
    with mixed.appending(slots[:1], [count]) as places:
        written = {cell // 8 for cell in places["sliding_attention"][1].tolist()}
        assert count < 16 or written & set(seen.values()) - {seen[37 // 8]}
        new.fill(slots[0], 37, filled, places)
        new.on_device[0].copy_(torch.tensor(filled))
        hidden = session.mixed(*canvases, mixed.tables(slots), table=mixed.tables(slots[:1]), **new.tensors())
    assert torch.equal(hidden, expected)
    assert all(torch.equal(*pair) for pair in zip(mixed.pages, apart.pages, strict=True))
    assert mixed.length == apart.length
    bound = zip(session.manifest.programs["mixed"].weights, session._weights["mixed"], strict=True)
    scalars = [weight.item() for name, weight in bound if name.endswith("layer_scalar")]
    assert len(scalars) == 2 * model.num_layers and len(set(scalars)) > model.num_layers
