"""The memory plan: hand-computed sizes, what is allocated in fact, budgets that hold and budgets that cannot."""

import dataclasses
import itertools

import pytest
import torch
from small_checkpoints import network_session, random_checkpoint
from sparse_checkpoint import SHAPE_26B

from backend.canvas_loop import CanvasLoop
from backend.encode_pass import pass_sizes, warm_up
from backend.engine import Engine
from backend.kv_cache import PagedKVCache
from backend.pass_memory import denoise_bytes, encode_bytes
from backend.planner import EngineLimits, check_free, check_weights_fit, plan_memory
from backend.session import Session
from builder.build import write_manifest
from contract.manifest import ManifestError, Variant


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return network_session(random_checkpoint(tmp_path_factory.mktemp("random"), seed=8), page_size=8)


def plan(session, **limits):
    return plan_memory(session.manifest, EngineLimits(**limits))


def test_sizes_by_hand(session):
    """float32, 2 sliding layers of 2 heads of 16 with a window of 24, 1 full layer of 1 head of 32, pages of 8 tokens."""
    made = plan(session, max_cached_tokens=100, max_sequences=3)
    assert made.page_bytes == {"sliding_attention": 8 * 2 * 2 * 2 * 16 * 4, "full_attention": 8 * 2 * 1 * 32 * 4}
    assert made.num_pages == {"full_attention": 13, "sliding_attention": 13}
    assert made.kv_bytes == 13 * (4096 + 2048)
    assert (made.num_sequences(20), made.num_sequences(50), made.num_sequences(105)) == (3, 1, 0)


def test_a_pass_of_every_kind_warms_an_engine_up(engine_dir, monkeypatch):
    """Each variant at its fewest tokens, the last at its most, too; few tokens with a page table of one column, and of all."""
    session = Session.load(engine_dir)
    cache = PagedKVCache(
        session.manifest.model,
        page_size=session.manifest.build.page_size,
        num_pages=dict.fromkeys(session.manifest.model.attention, 4),
        max_sequences=2,
        max_tokens=session.manifest.model.max_position_embeddings,
        dtype=session.dtype,
        device=session.device,
    )
    session.bind_pages(cache.pages)
    encode = session.manifest.programs["encode"].model_copy(update={"variants": (Variant(minimum=64, file=""),)})
    programs = session.manifest.programs | {"encode": encode}
    monkeypatch.setattr(session, "manifest", session.manifest.model_copy(update={"programs": programs}))
    ran, run = [], session.encode

    def recorded(token_ids, positions, starts, prefix_lengths, tables):
        ran.append((len(token_ids), tables["full_attention"].shape[1]))
        return run(token_ids, positions, starts, prefix_lengths, tables)

    monkeypatch.setattr(session, "encode", recorded)
    before = [pages.clone() for pages in cache.pages]
    warm_up(session, cache)
    most, wide = session.manifest.build.max_encode_tokens, cache.device_tables["full_attention"].shape[1]
    assert ran == [(16, 1), *((size, wide) for size in pass_sizes(most, [64]))]
    assert all(torch.equal(*each) for each in zip(before, cache.pages, strict=True))
    assert cache.length == [0, 0]


@pytest.mark.parametrize(
    ("most", "minimums", "expected"),
    [
        (8, [], [8]),
        (40, [], [16, 32, 40]),
        (511, [], [16, 32, 48, 64, 96, 128, 192, 256, 384, 511]),
        (600, [512], [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 600]),
    ],
)
def test_passes_that_are_run_when_an_engine_is_loaded(most, minimums, expected):
    assert pass_sizes(most, minimums) == expected


def test_plans_of_tensorrt_have_no_more_pages_than_a_tensor_may(tmp_path):
    manifest = write_manifest(SHAPE_26B, tmp_path / "26b")
    for_plans = manifest.model_copy(update={"build": manifest.build.model_copy(update={"target": "tensorrt"})})
    for limits in (EngineLimits(memory_bytes=139 * 10**9), EngineLimits(max_cached_tokens=4_000_000)):
        many, bounded = (plan_memory(each, limits, device_type="cuda").num_pages for each in (manifest, for_plans))
        assert many["full_attention"] > bounded["full_attention"] == (2**31 - 1) // (32 * 2 * 2 * 512)
        assert bounded["sliding_attention"] <= (2**31 - 1) // (32 * 2 * 8 * 256)


def test_what_cannot_hold_is_told_before_weights_are_read(engine_dir, monkeypatch):
    monkeypatch.setattr(Session, "load", None)
    with pytest.raises(ManifestError, match=r"max_sequences: got 65, expected 1 to 64"):
        Engine.load(engine_dir, EngineLimits(max_sequences=65))
    with pytest.raises(ManifestError, match=r"memory_bytes: got 0\.00 GB, expected at least"):
        Engine.load(engine_dir, EngineLimits(memory_bytes=1000))


def test_the_plan_is_what_is_allocated(session):
    made = plan(session, max_sequences=5)
    assert made.weights_bytes == sum({id(each): each.nbytes for group in session._weights.values() for each in group}.values())
    cache = PagedKVCache(
        session.manifest.model,
        page_size=8,
        num_pages=made.num_pages,
        max_sequences=5,
        max_tokens=2048,
        dtype=session.dtype,
        device=session.device,
    )
    assert made.kv_bytes == sum(pages.nbytes for pages in cache.pages)
    state = [each for each in vars(CanvasLoop(session, cache)).values() if isinstance(each, torch.Tensor) and len(each) == 6]
    assert len(state) == 15 and sum(each.nbytes for each in state) <= made.states_bytes


def test_new_tokens_of_a_mixed_pass_are_planned_for(session):
    """As many as a canvas has, on a GPU; none of an engine that has no such pass."""
    without = session.manifest.model_copy(update={"build": session.manifest.build.model_copy(update={"batch_invariant": True})})
    mixed, apart = (
        plan_memory(each, EngineLimits(max_sequences=5), device_type="cuda") for each in (session.manifest, without)
    )
    canvas = denoise_bytes(without.model, without.build, without.model.canvas_length, "cuda")
    assert mixed.graphs_bytes - apart.graphs_bytes == canvas


@pytest.mark.parametrize("num_tokens", [16, 100, 2048])
def test_a_budget_holds_and_is_used(num_tokens, session):
    roomy = plan(session, max_sequences=4, max_cached_tokens=4 * num_tokens, prefix_cache=False)
    made = plan(session, max_sequences=4, memory_bytes=roomy.total_bytes + 200_000, prefix_cache=False)
    assert made.total_bytes <= roomy.total_bytes + 200_000
    assert made.num_sequences(num_tokens) == 4


def test_a_budget_that_holds_nothing(session):
    with pytest.raises(
        ManifestError, match=r"memory_bytes: got 0\.00 GB, expected at least 0\.\d\d GB for weights \(0\.\d\d\)"
    ):
        plan(session, memory_bytes=1000)


def test_default_pages_let_every_sequence_be_as_long_as_the_model_allows(session):
    made = plan(session, max_sequences=16)
    assert made.num_sequences(2048) == 16
    assert plan(session, max_sequences=1).num_pages["full_attention"] == 4 * 2048 // 8


def test_the_workspace_does_not_grow_with_sequences(session):
    assert plan(session, max_sequences=64).workspace_bytes == plan(session, max_sequences=4).workspace_bytes


def allocated_bytes(run) -> int:
    """The most memory that PyTorch's tensors take at once on the CPU while `run` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_the_estimate_of_a_pass_is_what_compiled_programs_allocate(engine_dir):
    """No less, and a fifth more at most."""
    compiled = Session.load(engine_dir)
    model, build, rows = compiled.manifest.model, compiled.manifest.build, 1024
    sequences = rows // model.canvas_length
    cache = PagedKVCache(
        model,
        page_size=build.page_size,
        num_pages=dict.fromkeys(model.attention, sequences),
        max_sequences=sequences,
        max_tokens=build.page_size,
        dtype=compiled.dtype,
        device=compiled.device,
    )
    compiled.bind_pages(cache.pages)
    tables = cache.tables([cache.open(1) for _ in range(sequences)])
    lengths = torch.zeros(sequences, dtype=torch.int32)
    token_ids = torch.randint(model.vocab_size, (rows,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    canvases = token_ids.view(sequences, -1)
    soft_embeds = torch.zeros(*canvases.shape, model.hidden_size, dtype=compiled.dtype)
    denoise = allocated_bytes(lambda: compiled.denoise(canvases, soft_embeds, lengths, tables))
    assert denoise <= denoise_bytes(model, build, rows, "cpu") <= 1.2 * denoise
    starts, positions = torch.tensor([0, rows], dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
    of_one = {kind: table[:1] for kind, table in tables.items()}
    encode = allocated_bytes(lambda: compiled.encode(token_ids, positions, starts, lengths[:1], of_one))
    largest = build.model_copy(update={"max_encode_tokens": rows})
    assert encode <= encode_bytes(model, largest, "cpu") <= 1.2 * encode


def test_the_report(session):
    lines = plan(session, max_sequences=2, max_cached_tokens=2048).report().splitlines()
    assert lines[0].startswith("memory  ") and "KV pages" in lines[0]
    assert lines[1] == "fits    sequences of so many tokens: 2 of 1,024, 1 of 2,048"


@pytest.mark.parametrize(("most", "expected"), [(64, 16), (16, 16), (5, 5)])
def test_an_engine_that_takes_few_sequences_is_given_as_many(session, most, expected):
    build = session.manifest.build.model_copy(update={"max_sequences": most})
    assert plan_memory(session.manifest.model_copy(update={"build": build}), EngineLimits()).max_sequences == expected


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_sequences": 0}, "max_sequences: got 0, expected at least 1"),
        ({"memory_bytes": -1}, "memory_bytes: got -1, expected at least 1"),
        ({"max_sequences": 65}, "max_sequences: got 65, expected 1 to 64; lower it, or rebuild the engine"),
        ({"max_cached_tokens": 1, "memory_bytes": 1}, "max_cached_tokens and memory_bytes: got both"),
    ],
)
def test_refusals(limits, message, session):
    with pytest.raises(ManifestError, match=message):
        plan(session, **limits)


def test_what_is_to_come_must_be_free(session):
    made = plan(session, max_sequences=2)
    to_come = made.total_bytes - made.weights_bytes - made.runtime_bytes
    check_free(made, to_come)
    with pytest.raises(ManifestError, match=r"memory: got \d+\.\d\d GB free beside the weights, expected \d+\.\d\d GB for"):
        check_free(made, to_come - 1)


def test_weights_must_fit_before_they_are_loaded(session):
    """The session asks on a GPU alone; what it is told there is this."""
    needed = plan(session).weights_bytes
    check_weights_fit(session.manifest, needed)
    with pytest.raises(ManifestError, match=r"memory: got 0\.00 GB free, expected 0\.00 GB for the weights; .* take less"):
        check_weights_fit(session.manifest, needed - 1)


def test_limits_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineLimits().max_sequences = 2
