"""Pages: what is kept, what is freed, what is promised."""

import mmap
import random
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_checkpoints import random_checkpoint

from backend.kv_cache import PagedKVCache, zeros
from backend.prefix_cache import extend_page_keys
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


@pytest.mark.parametrize("failing", ["upload_tables", "pages"])
def test_a_write_that_fails_leaks_no_page(model, monkeypatch, failing):
    """As when the device has no memory left: the caller closes the slots."""
    cache = cache_of(model)
    slot, keys = cache.open(200), [bytes([index]) * 16 for index in range(25)]

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        if failing == "upload_tables":
            broken.setattr(cache, "upload_tables", fail)
        else:
            broken.setattr(cache, "pages", [SimpleNamespace(flatten=fail)] * len(cache.pages))
        with pytest.raises(RuntimeError, match="out of memory"):
            cache.append([slot], [200], [None] * len(cache.pages), page_keys=[keys])
    cache.close(slot)
    assert set(cache.num_pages_used.values()) == {0}
    assert set(cache.num_pages_kept.values()) == {0}


class Told:
    """One open sequence of `test_random_lives`: its tokens, and how many of them it may come to."""

    def __init__(self, tokens: list[int], most: int):
        self.tokens, self.most = tokens, most
        self.keys: list[bytes] = []
        extend_page_keys(self.keys, tokens, PAGE)


def value_of(tokens: list[int], position: int) -> float:
    """What the cache holds of a token, which depends on all before it."""
    return float(zlib.crc32(bytes(tokens[: position + 1])) % 65_521)


@pytest.mark.parametrize("seed", range(6))
def test_random_lives(model, seed):
    """Sequences that share beginnings open, grow, and close in any order, with few pages. After every step each sequence reads
    its own keys and values through its table, and no page is lost, held twice or promised to nobody."""
    rng = random.Random(seed)
    cache = cache_of(model, pages=rng.choice((24, 30, 45)), max_sequences=5)
    trunk = [rng.randrange(250) for _ in range(160)]
    living: dict[int, Told] = {}
    num_hits = 0
    for _ in range(250):
        doing = rng.choice(("open", "open", "append", "append", "append", "close"))
        if doing == "open":
            tokens = trunk[: rng.choice((8, 30, 64, 100, 160))] + [rng.randrange(250) for _ in range(rng.choice((0, 3, 40)))]
            told = Told(tokens, len(tokens) + rng.choice((0, 16, 48)))
            if cache.fits(told.most, page_keys=told.keys):
                slot = cache.open(told.most, page_keys=told.keys)
                assert slot not in living
                living[slot] = told
                num_hits += cache.length[slot] > 0
        elif doing == "append":
            slots = [slot for slot in living if rng.random() < 0.6 and cache.length[slot] < living[slot].most]
            counts = []
            for slot in slots:
                told, length = living[slot], cache.length[slot]
                if length == len(told.tokens):
                    told.tokens += [rng.randrange(250) for _ in range(min(16, told.most - length))]
                    extend_page_keys(told.keys, told.tokens, PAGE)
                counts.append(rng.randint(1, len(told.tokens) - length))
            if slots:
                new = [
                    value_of(living[slot].tokens, cache.length[slot] + index)
                    for slot, count in zip(slots, counts, strict=True)
                    for index in range(count)
                ]
                values = torch.tensor(new)[:, None, None, None]
                new_kv = [values.expand(-1, *pages.shape[2:]) for pages in cache.pages]
                keep = rng.random() < 0.9
                cache.append(slots, counts, new_kv, page_keys=[living[slot].keys for slot in slots] if keep else None)
        elif living:
            slot = rng.choice([*living])
            del living[slot]
            cache.close(slot)
        check_accounts(cache)
        for slot, told in living.items():
            check_contents(cache, model, slot, told)
    for slot in living:
        cache.close(slot)
    check_accounts(cache)
    assert set(cache.num_pages_used.values()) == {0}
    assert all(pool.num_promised == 0 for pool in cache._pools.values())
    assert num_hits > 10


def check_accounts(cache: PagedKVCache) -> None:
    for kind, pool in cache._pools.items():
        held = Counter(page for owned in cache._owned for page in owned.get(kind, {}).values())
        assert held == Counter({page: count for page, count in enumerate(pool._references) if count})
        places = [*pool._free, *pool._kept, *pool._kept_cold, *held]
        assert sorted(places) == list(range(pool.num_pages))
        assert pool.num_promised == sum(
            most[kind] - len(owned[kind]) for most, owned in zip(cache._most, cache._owned, strict=True) if most
        )
        assert pool._page_of == {name: page for page, name in pool._name_of.items()}
        assert pool.num_available >= 0


def check_contents(cache: PagedKVCache, model, slot: int, told: Told) -> None:
    tables, total = cache.tables([slot]), cache.length[slot]
    for layer, kind in enumerate(model.layer_types):
        window = model.attention[kind].window
        for position in range(max(0, total - window + 1) if window else 0, total):
            page = tables[kind][0, position // PAGE]
            assert cache.pages[layer][page, position % PAGE, 0, 0, 0] == value_of(told.tokens, position)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_take_memory_when_they_are_written(dtype):
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident_bytes()
    pages = zeros((1024, 32, 2, 8, 256), dtype, torch.device("cpu"))
    assert (pages.shape, pages.dtype, pages.is_contiguous()) == ((1024, 32, 2, 8, 256), dtype, True)
    assert resident_bytes() - before < pages.nbytes / 100
    pages[:512] = 1
    assert resident_bytes() - before > pages.nbytes / 3
    assert pages[512:].count_nonzero() == 0
