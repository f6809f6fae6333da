"""The prefix cache: what names a page, which prefixes can be used, what is evicted; keys and values are the same bits."""

import itertools
from dataclasses import replace
from random import Random

import pytest
import torch
from small_checkpoints import network_session, random_checkpoint
from test_scheduler import CANVAS, add, prompt_of, run, scheduler_of

from backend.encode_pass import NewTokens, encode_new_tokens
from backend.kv_cache import PagedKVCache
from backend.metrics import Series
from backend.page_pool import PagePool
from backend.prefix_cache import ImageSpan, extend_page_keys, usable_pages
from backend.session import Session

PAGE = 8  # and a window of 24, so that a token sees 23 before it


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_checkpoint(tmp_path_factory.mktemp("random"), seed=8, max_position_embeddings=32_768)


@pytest.fixture(scope="module")
def session(checkpoint):
    return network_session(checkpoint, page_size=PAGE, max_encode_tokens=512)


def keys_of(tokens: list[int], images=()) -> list[bytes]:
    keys: list[bytes] = []
    extend_page_keys(keys, tokens, PAGE, images)
    return keys


def test_a_key_stands_for_everything_up_to_its_page():
    tokens = prompt_of(30, seed=1)
    keys = keys_of(tokens)
    assert len(keys) == 3 and len(set(keys)) == 3
    assert keys_of(tokens[:29]) == keys
    assert keys_of(tokens[:16]) == keys[:2]
    grown = keys_of(tokens[:9])
    extend_page_keys(grown, tokens, PAGE)
    assert grown == keys
    changed = [tokens[0] + 1, *tokens[1:]]
    assert not set(keys_of(changed)) & set(keys)
    assert keys_of([*tokens[:20], tokens[20] + 1, *tokens[21:]])[:2] == keys[:2]
    assert keys_of(tokens[8:16]) != keys[1:2]  # the same tokens elsewhere


def test_images_are_part_of_the_key():
    tokens = [5] * 32
    one, other = ([ImageSpan(10, 20, key)] for key in (b"one", b"other"))
    assert keys_of(tokens, one) == keys_of(tokens, one)
    assert keys_of(tokens, one)[0] == keys_of(tokens, other)[0] == keys_of(tokens)[0]
    assert keys_of(tokens, one)[1] != keys_of(tokens, other)[1]
    assert keys_of(tokens, one)[3] != keys_of(tokens, other)[3]


@pytest.mark.parametrize(
    ("full", "sliding", "images", "usable"),
    [
        ("1111", "1111", [], 4),
        ("1101", "1111", [], 2),
        ("0111", "1111", [], 0),
        ("1111", "0111", [], 4),  # behind 32 tokens, 9 to 31 are seen: pages 1 to 3
        ("1111", "1011", [], 1),  # behind page 1 alone; behind pages 3 and 4 page 1 is missing
        ("1111", "1110", [], 3),
        ("1111", "0011", [], 0),
        ("1111", "1111", [ImageSpan(26, 40, b"")], 4 - 1),
        ("1111", "1111", [ImageSpan(20, 32, b"")], 4),
        ("1111", "1111", [ImageSpan(6, 40, b"")], 0),
    ],
)
def test_usable_prefixes_by_hand(full, sliding, images, usable):
    keys = keys_of(prompt_of(32, seed=1))
    pools = {"full_attention": PagePool(4, gives_up=False), "sliding_attention": PagePool(4, gives_up=True)}
    for pool, there in zip(pools.values(), (full, sliding), strict=True):
        for key, is_there in zip(keys, there, strict=True):
            if is_there == "1":
                pool.name(pool.take(), key)
    kept = {"full_attention": None, "sliding_attention": 23}
    assert usable_pages(keys, pools, kept, PAGE, images) == usable


@pytest.mark.parametrize("seed", range(100))
def test_usable_prefixes_by_their_definition(seed):
    """Of 30 pages, some of them missing, and two windows."""
    random = Random(seed)
    keys, kept = keys_of(prompt_of(240, seed=1)), {"full": None, "narrow": random.randrange(1, 40), "wide": 60}
    there = {kind: [random.random() > 0.1 for _ in keys] for kind in kept}
    num_first = random.randrange(30)
    there["full"][:num_first] = [True] * num_first
    pools = {kind: PagePool(30, gives_up=kind != "full") for kind in kept}
    for kind, pool in pools.items():
        for key in itertools.compress(keys, there[kind]):
            pool.name(pool.take(), key)
    images = [ImageSpan(start, start + random.randrange(30), b"") for start in random.sample(range(200), 2)]
    multiple = random.choice((1, 2, 3))

    def is_usable(pages: int) -> bool:
        seen = {kind: range(0 if each is None else max(0, pages * PAGE - each) // PAGE, pages) for kind, each in kept.items()}
        whole = not any(image.start < pages * PAGE < image.end for image in images)
        return whole and all(there[kind][page] for kind, pages_seen in seen.items() for page in pages_seen)

    assert usable_pages(keys, pools, kept, PAGE, images, multiple) == max(filter(is_usable, range(0, 31, multiple)))


@pytest.mark.parametrize("there", [lambda page: False, lambda page: page % 3, lambda page: True], ids=["none", "some", "all"])
def test_each_page_is_looked_up_about_once(there, monkeypatch):
    """Of a long prompt whose first pages are all there, and of whose windows' pages none, some or all are."""
    keys = keys_of(prompt_of(1000 * PAGE, seed=1))
    pools = {"full": PagePool(1000, gives_up=False), "sliding": PagePool(1000, gives_up=True)}
    for page, key in enumerate(keys):
        pools["full"].name(pools["full"].take(), key)
        if there(page):
            pools["sliding"].name(pools["sliding"].take(), key)
    looked_up, find = [], PagePool.find
    monkeypatch.setattr(PagePool, "find", lambda pool, key: looked_up.append(key) or find(pool, key))
    usable_pages(keys, pools, {"full": None, "sliding": 32 * PAGE - 1}, PAGE)
    assert len(looked_up) <= 2 * 1000


def test_a_pool_gives_what_nobody_misses_first():
    pool = PagePool(4, gives_up=False)
    pages = {name: pool.take() for name in (b"a", b"b", b"c", b"d")}
    for name in (b"a", b"b", b"c"):
        pool.name(pages[name], name)
    assert (pool.num_used, pool.num_kept, pool.num_available) == (4, 0, 0)
    for name in (b"d", b"b", b"a"):
        pool.release(pages[name])
    pool.release(pages[b"c"], cold=True)
    assert (pool.num_used, pool.num_kept, pool.num_available) == (0, 3, 4)
    assert pool.take() == pages[b"d"]  # free
    assert pool.take() == pages[b"c"]  # cold
    assert pool.find(b"c") is None
    pool.share(pool.find(b"b"))
    assert pool.take() == pages[b"a"]  # kept longest, but for b, which is held again
    assert (pool.num_used, pool.num_available, pool.find(b"b")) == (4, 0, pages[b"b"])


def encoded(session, tokens: list[int], cuts: list[int], neighbour: int = 0) -> list[torch.Tensor]:
    """The keys and values of full-attention layers, encoded in passes that end at `cuts`, beside a neighbour's tokens."""
    page_size = session.manifest.build.page_size
    cache = PagedKVCache(
        session.manifest.model,
        page_size=page_size,
        num_pages=dict.fromkeys(session.manifest.model.attention, 100),
        max_sequences=2,
        max_tokens=1024,
        dtype=session.dtype,
        device=session.device,
    )
    session.bind_pages(cache.pages)
    slot, other = cache.open(len(tokens)), cache.open(400)
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        packed = [NewTokens(slot=slot, token_ids=tokens[start:end], page_keys=[])]
        if neighbour:
            packed.append(NewTokens(slot=other, token_ids=[7] * neighbour, page_keys=[]))
        encode_new_tokens(session, cache, packed, keep_pages=False)
    positions = torch.arange(len(tokens))
    table = cache.tables([slot])["full_attention"][0].long()
    layers = [index for index, kind in enumerate(session.manifest.model.layer_types) if kind == "full_attention"]
    return [cache.pages[layer][table[positions // page_size], positions % page_size] for layer in layers]


@pytest.mark.parametrize(
    ("cuts", "neighbour"),
    [([], 1), ([], 100), ([128], 0), ([64, 128, 192], 0), ([1, 2, 3, 199], 0), ([77], 5), ([*range(7, 200, 7)], 0)],
    ids=str,
)
def test_the_same_bits_however_a_prompt_is_cut_into_passes(cuts, neighbour, session):
    tokens = prompt_of(200, seed=3)
    for actual, expected in zip(encoded(session, tokens, cuts, neighbour), encoded(session, tokens, []), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["network", "engine"])
def test_a_short_prompt_has_the_same_bits_beside_others(compiled, session, request):
    """So few rows that a library's products would round differently."""
    session = Session.load(request.getfixturevalue("engine_dir")) if compiled else session
    for length in (1, 2, 3, 4, 5, 8, 9, 13, 17):
        tokens = prompt_of(length, seed=3)
        alone = encoded(session, tokens, [])
        for neighbour in (1, 4, 30):
            for actual, expected in zip(encoded(session, tokens, [], neighbour), alone, strict=True):
                assert torch.equal(actual, expected), (length, neighbour)


def hit_tokens(scheduler) -> int:
    return int(scheduler.metrics.drain().counters.get(Series("prefix_cache_hit_tokens_total"), 0))


def test_turns_of_a_chat_encode_only_what_is_new(checkpoint):
    """Each prompt is the last one, its answer and a new question; with commit_last the whole answer is there."""
    for commit_last in (False, True):
        scheduler = scheduler_of(checkpoint, commit_last=commit_last)
        fresh = scheduler_of(checkpoint, prefix_cache=False)
        prompt, cached = prompt_of(50, seed=1), 0
        for turn in range(4):
            _, sent = add(scheduler, prompt, seed=turn, max_tokens=40)
            _, expected = add(fresh, prompt, seed=turn, max_tokens=40)
            run(scheduler)
            run(fresh)
            assert sent.token_ids == expected.token_ids
            assert hit_tokens(scheduler) == cached // PAGE * PAGE
            committed = 40 if commit_last else 2 * CANVAS  # of three canvases
            cached = len(prompt) + committed
            prompt = prompt + sent.token_ids + prompt_of(10, seed=turn)


def test_without_the_cache_no_room_is_kept_for_the_last_canvas(checkpoint):
    for commit_last in (False, True):
        scheduler = scheduler_of(checkpoint, max_cached_tokens=128, prefix_cache=False, commit_last=commit_last)
        _, sent = add(scheduler, prompt_of(128, seed=1), max_tokens=CANVAS)
        run(scheduler)
        assert len(sent.token_ids) == CANVAS


def test_a_prompt_that_is_all_there_is_not_encoded(checkpoint):
    scheduler, prompt = scheduler_of(checkpoint), prompt_of(6 * PAGE, seed=1)
    _, first = add(scheduler, prompt)
    run(scheduler)
    hit_tokens(scheduler)
    job, again = add(scheduler, prompt)
    scheduler.tick()
    assert (hit_tokens(scheduler), job.num_pending) == (6 * PAGE, 0)
    run(scheduler)
    assert {each.num_cached_tokens for each in first.outputs} == {0}
    assert again.outputs == [replace(each, num_cached_tokens=6 * PAGE) for each in first.outputs]


def test_prompts_that_part_in_the_middle_share_what_they_have_in_common(checkpoint):
    """Far from where the first one ended, so that sliding layers must have kept a window that left the first one's."""
    scheduler, common = scheduler_of(checkpoint, max_encode_tokens=512), prompt_of(100, seed=1)
    add(scheduler, common + prompt_of(150, seed=2))
    run(scheduler)
    hit_tokens(scheduler)
    add(scheduler, common + prompt_of(20, seed=3))
    run(scheduler)
    assert hit_tokens(scheduler) == 100 // PAGE * PAGE


def test_requests_share_pages_while_they_run(checkpoint):
    scheduler, prompt = scheduler_of(checkpoint, max_encode_tokens=512), prompt_of(20 * PAGE, seed=1)
    for seed in range(3):
        add(scheduler, prompt, seed=seed, max_denoising_steps=40, confidence_threshold=0, max_tokens=CANVAS)
        scheduler.tick()
    assert scheduler._cache.num_pages_used["full_attention"] == 20
    run(scheduler)
    assert scheduler._cache.num_pages_used["full_attention"] == 0
    assert scheduler._cache.num_pages_kept["full_attention"] == 20


def test_cached_pages_make_room(checkpoint):
    """Pages for one request at a time: each finds what the last one left, evicts it and gets the tokens that it gets alone."""
    tight, roomy = scheduler_of(checkpoint, max_cached_tokens=160), scheduler_of(checkpoint, prefix_cache=False)
    for turn in range(12):
        prompt = prompt_of(100, seed=turn % 3)
        (_, sent), (_, expected) = add(tight, prompt, seed=turn), add(roomy, prompt, seed=turn)
        run(tight)
        run(roomy)
        assert sent.token_ids == expected.token_ids
    add(tight, prompt_of(100, seed=2))
    run(tight)
    assert hit_tokens(tight) > 0
    assert tight._cache.num_pages_kept["full_attention"] <= 20
