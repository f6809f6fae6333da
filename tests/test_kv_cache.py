"""Pages: what is kept, what is freed, what is promised."""

import pytest
import torch
from small_checkpoints import random_checkpoint

from backend.kv_cache import PagedKVCache
from builder.config import read_model_config

PAGE = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return read_model_config(random_checkpoint(tmp_path_factory.mktemp("model"), sliding_window=24))


def cache_of(model, *, pages=40, max_sequences=3) -> PagedKVCache:
    return PagedKVCache(
        model,
        page_size=PAGE,
        num_pages=dict.fromkeys(model.attention, pages),
        max_sequences=max_sequences,
        max_tokens=400,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def append(cache, model, slots, counts, seed=0):
    """Appends random keys and values and returns them, one tensor a layer."""
    generator = torch.Generator().manual_seed(seed)
    new_kv = []
    for kind in model.layer_types:
        attention = model.attention[kind]
        new_kv.append(torch.randn(sum(counts), 2, attention.num_kv_heads, attention.head_dim, generator=generator))
    cache.append(slots, counts, new_kv)
    return new_kv


@pytest.mark.parametrize("counts", [[1], [7, 1, 8, 9], [100], [3] * 40, [16, 24, 1, 64]], ids=str)
def test_cached_tokens_are_where_the_table_says(model, counts):
    cache = cache_of(model)
    slot = cache.open(sum(counts))
    appended = [append(cache, model, [slot], [count], seed) for seed, count in enumerate(counts)]
    tables, total = cache.tables([slot]), sum(counts)
    for layer, kind in enumerate(model.layer_types):
        expected = torch.cat([new_kv[layer] for new_kv in appended])
        window = model.attention[kind].window
        positions = torch.arange(max(0, total - window + 1) if window else 0, total)
        pages = tables[kind][0, positions // PAGE].long()
        assert torch.equal(cache.pages[layer][pages, positions % PAGE], expected[positions])


def test_sequences_do_not_share_pages(model):
    cache = cache_of(model)
    slots = [cache.open(64), cache.open(64)]
    first = append(cache, model, slots, [20, 30], seed=1)
    append(cache, model, [slots[1]], [30], seed=2)
    table = cache.tables([slots[0]])["full_attention"][0]
    layer = model.layer_types.index("full_attention")
    positions = torch.arange(20)
    assert torch.equal(cache.pages[layer][table[positions // PAGE].long(), positions % PAGE], first[layer][:20])


def test_sliding_layers_keep_only_the_window(model):
    cache = cache_of(model)
    slot = cache.open(300)
    most = cache.pages_needed(300)
    assert most == {"full_attention": 38, "sliding_attention": 4}  # 23 tokens touch at most 4 pages of 8
    for seed in range(30):
        append(cache, model, [slot], [10], seed)
        assert cache.num_pages_used["sliding_attention"] <= most["sliding_attention"]
    assert cache.num_pages_used["full_attention"] == 38


def test_closing_gives_everything_back(model):
    cache = cache_of(model)
    for _ in range(5):
        slots = [cache.open(100), cache.open(50)]
        append(cache, model, slots, [100, 50])
        for slot in slots:
            cache.close(slot)
    assert set(cache.num_pages_used.values()) == {0}
    assert cache.fits(320)


def test_fits_counts_what_is_promised_not_what_is_used(model):
    cache = cache_of(model, pages=20)
    assert cache.fits(160)
    assert not cache.fits(161)
    slot = cache.open(100)
    assert cache.fits(56)
    assert not cache.fits(57)
    assert cache.fits(160, when_empty=True)
    cache.close(slot)
    assert cache.fits(160)


def test_slots_run_out(model):
    cache = cache_of(model, max_sequences=1)
    cache.open(8)
    assert not cache.fits(8)
