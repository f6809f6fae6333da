"""The cases of `test_moe_kernels.py`, which runs this file in Triton's interpreter (TRITON_INTERPRET=1).

Memory that a kernel must not read is NaN: every output before its kernel runs (PyTorch's deterministic mode fills new
tensors with NaN, or the largest integer) and the weights of experts that no row chose.
"""

from dataclasses import replace

import pytest
import torch
from tolerances import assert_close
from triton_interpreter import let_casts_round_to_bfloat16, let_dot_read_bfloat16, save_the_interpreters_time

from plugins.feed_forward.reference import route
from plugins.moe import alignment, kinds, launch
from plugins.moe.kernel_reference import (
    align_reference,
    combine_reference,
    down_reference,
    gate_up_reference,
    router_reference,
)
from plugins.moe.launch import FEW_ROWS, Tile
from plugins.moe.reference import experts_reference

let_dot_read_bfloat16()
let_casts_round_to_bfloat16()
save_the_interpreters_time()

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy's, about sigmoid of a large negative number: 1 / (1 + inf) = 0 is meant.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]

DTYPES = [torch.float32, torch.bfloat16]
EXPERTS = 16
RANDOM, SAME_EXPERTS, ONE_EXPERT = "random", "all rows to the same experts", "all rows to one expert"
ROUTINGS = [(1, RANDOM), (63, RANDOM), (257, RANDOM), (63, SAME_EXPERTS), (63, ONE_EXPERT)]
SMALL = Tile(rows=16, width=16, depth=16, num_warps=4, num_stages=2)
WEIGHTS_FIRST = replace(SMALL, weights_first=True)


def routed_to(rows: int, routing: str) -> torch.Tensor:
    index = torch.rand(rows, EXPERTS).topk(1 if routing == ONE_EXPERT else 8).indices
    return index if routing == RANDOM else index[:1].expand_as(index).contiguous()


def align_at_once(index: torch.Tensor, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor]:
    return alignment.align(index, experts, 16).run()


def align_in_chunks(index: torch.Tensor, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor]:
    (counts,) = alignment.count(index, experts, chunk=32).run()
    return alignment.place(index, *alignment.scan(counts, 16).run(), experts, 16, chunk=32).run()


def weights_of(index: torch.Tensor, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    weights = torch.randn(EXPERTS, *shape) * 0.3
    weights[sorted(set(range(EXPERTS)) - set(index.unique().tolist()))] = float("nan")
    return weights.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "experts", "top_k"), [(1, 128, 8), (63, 128, 8), (257, 128, 8), (63, 20, 3), (5, 16, 16), (5, 4, 1)]
)
def test_router(rows, experts, top_k, dtype):
    logits, scale = (3 * torch.randn(rows, experts)).to(dtype), torch.rand(experts).to(dtype)
    weights, index = launch.router(logits, scale, top_k).run()
    expected_weights, expected_index = router_reference(logits, scale, top_k)
    assert index.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert torch.equal(index, expected_index)
    assert_close(weights, expected_weights, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden", "experts"), [(1, 40, 16), (130, 700, 20), (65, 600, 128)])
def test_the_routers_logits_are_a_products_and_the_same_however_many_programs_share_a_row(
    rows, hidden, experts, dtype, monkeypatch
):
    x, projection = torch.randn(rows, hidden).to(dtype), torch.randn(experts, hidden).to(dtype)
    (parts,) = launch.router_logits(x, projection).run()
    monkeypatch.setattr(launch, "ROUTER_MANY_ROWS", 1)
    (halves,) = launch.router_logits(x, projection).run()
    assert (len(parts), len(halves)) == (-(-hidden // launch.ROUTER_PART), min(2, len(parts)))
    logits = halves.sum(0).to(dtype)
    assert_close(logits, (x.float() @ projection.float().T).to(dtype), dtype)
    chosen = [launch.router(each, torch.ones(experts), 2, dtype).run() for each in (parts, halves, logits)]
    assert all(torch.equal(*pair) for other in chosen[1:] for pair in zip(chosen[0], other, strict=True))


def test_router_takes_the_lower_index_of_equal_logits():
    logits = torch.zeros(2, 16)
    logits[1, 9] = 1.0
    _, index = launch.router(logits, torch.ones(16), 4).run()
    assert index.tolist() == [[0, 1, 2, 3], [9, 0, 1, 2]]


def test_router_survives_large_logits():
    weights, index = launch.router(torch.tensor([[-1e30, 300.0, 1e30, 0.0]]), torch.ones(4), 2).run()
    assert weights.tolist() == [[1.0, 0.0]]
    assert index.tolist() == [[2, 1]]


def test_router_is_the_networks():
    """With the identity as projection, the router's logits are its normed rows."""
    hidden, eps = torch.randn(63, 128), 1e-6
    per_expert_scale = torch.rand(128)
    logits = hidden * (hidden.pow(2).mean(-1, keepdim=True) + eps) ** -0.5 * 30.0 * 128**-0.5
    top_k_weights, top_k_index = launch.router(logits, per_expert_scale, 8).run()
    expected_weights, expected_index = route(hidden, torch.full((128,), 30.0), torch.eye(128), per_expert_scale, 8, eps)
    assert torch.equal(top_k_index, expected_index)
    assert_close(top_k_weights, expected_weights, torch.float32)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("align", "rows", "routing"),
    [(align_at_once, 0, RANDOM), *((align, *each) for align in (align_at_once, align_in_chunks) for each in ROUTINGS)],
)
def test_align(align, rows, routing, index_dtype):
    index = routed_to(max(rows, 1), routing)[:rows]
    row_order, tile_expert = align(index.to(index_dtype))
    slots, experts = align_reference(index, EXPERTS, 16)
    assert row_order[: len(slots)].tolist() == slots
    assert tile_expert.tolist() == experts + [-1] * (len(tile_expert) - len(experts))


@pytest.mark.parametrize("align", [align_at_once, align_in_chunks])
def test_align_leaves_out_what_is_no_expert(align):
    index = torch.randint(-3, 23, (90, 4))
    row_order, tile_expert = align(index, 20)
    slots, experts = align_reference(index, 20, 16)
    assert row_order[: len(slots)].tolist() == slots
    assert tile_expert.tolist() == experts + [-1] * (len(tile_expert) - len(experts))


@pytest.mark.parametrize("align", [align_at_once, align_in_chunks])
def test_align_has_tiles_for_the_worst_routing(align):
    """15 experts with one row more than full tiles, and the last with the rest."""
    index = torch.tensor([*range(EXPERTS), *[15] * 16]).unsqueeze(1)
    _, tile_expert = align(index)
    assert tile_expert.tolist() == [*range(EXPERTS), 15]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tile", "hidden_size", "width"),
    [(SMALL, 48, 32), (SMALL, 40, 20), (WEIGHTS_FIRST, 40, 20), (FEW_ROWS, 130, 20)],
    ids=["whole", "masked", "weights first", "real"],
)
@pytest.mark.parametrize(("rows", "routing"), [(33, RANDOM), (33, SAME_EXPERTS), (33, ONE_EXPERT)])
def test_grouped_products(rows, routing, tile, hidden_size, width, dtype):
    index = routed_to(rows, routing)
    top_k = index.shape[1]
    row_order, tile_expert = alignment.align(index, EXPERTS, tile.rows).run()
    hidden = torch.randn(rows, hidden_size).to(dtype)
    gate_up_proj = weights_of(index, 2 * width, hidden_size, dtype=dtype)
    (activated,) = launch.gate_up(hidden, gate_up_proj, row_order, tile_expert, top_k, tile).run()
    expected = gate_up_reference(hidden, gate_up_proj, index)
    assert activated.dtype == dtype
    assert_close(activated, expected, dtype)

    down_proj, weights = weights_of(index, hidden_size, width, dtype=dtype), torch.rand(rows, top_k)
    (weighted,) = launch.down(expected, down_proj, weights, row_order, tile_expert, tile).run()
    assert weighted.dtype == dtype
    assert_close(weighted, down_reference(expected, down_proj, weights, index), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden_size", "top_k"), [(1, 16, 8), (63, 24, 1), (5, 1100, 3)])
def test_combine(rows, hidden_size, top_k, dtype):
    weighted = torch.randn(rows * top_k, hidden_size).to(dtype)
    (output,) = launch.combine(weighted, top_k).run()
    assert output.dtype == dtype
    assert_close(output, combine_reference(weighted, top_k), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "routing"), ROUTINGS)
def test_the_kernels_together_are_the_operator(rows, routing, dtype):
    index = routed_to(rows, routing)
    inputs = (
        torch.randn(rows, 24).to(dtype),
        index,
        torch.rand(index.shape),
        weights_of(index, 2 * 12, 24, dtype=dtype),
        weights_of(index, 24, 12, dtype=dtype),
    )
    assert_close(kinds.experts(*inputs), experts_reference(*inputs), dtype)


def test_no_rows():
    inputs = (torch.empty(0, 24), torch.empty(0, 8, dtype=torch.int64), torch.empty(0, 8))
    assert kinds.experts(*inputs, torch.randn(16, 24, 24), torch.randn(16, 24, 12)).shape == (0, 24)


def test_rows_of_any_layout():
    """Activations may be views; they are small enough to be copied."""
    index, hidden, weights = routed_to(9, RANDOM), torch.randn(24, 9).t(), torch.rand(8, 9).t()
    gate_up_proj, down_proj = 0.3 * torch.randn(EXPERTS, 24, 24), torch.randn(EXPERTS, 24, 12)
    inputs = (hidden, index.t().contiguous().t(), weights, gate_up_proj, down_proj)
    assert_close(kinds.experts(*inputs), experts_reference(*inputs), torch.float32)


def test_weights_that_would_need_a_copy_are_refused():
    rows = (torch.randn(9, 24), routed_to(9, RANDOM), torch.rand(9, 8))
    gate_up_proj, down_proj = torch.randn(EXPERTS, 24, 24), torch.randn(EXPERTS, 24, 12)
    with pytest.raises(ValueError, match=r"down_proj has strides \(288, 1, 24\); make it contiguous"):
        kinds.experts(*rows, gate_up_proj, torch.randn(EXPERTS, 12, 24).transpose(1, 2))
    with pytest.raises(ValueError, match=r"gate_up_proj is torch\.bfloat16, hidden is torch\.float32"):
        kinds.experts(*rows, gate_up_proj.bfloat16(), down_proj)


def test_the_tile_follows_the_rows_of_an_expert():
    assert launch.choose_tile(256, 8, 128, torch.bfloat16) == launch.FEW_ROWS
    assert launch.choose_tile(511, 8, 128, torch.bfloat16) == launch.FEW_ROWS
    assert launch.choose_tile(512, 8, 128, torch.bfloat16) == launch.SOME_ROWS
    assert launch.choose_tile(2047, 8, 128, torch.bfloat16) == launch.SOME_ROWS
    assert launch.choose_tile(2048, 8, 128, torch.bfloat16) == launch.MANY_ROWS
    assert launch.choose_down_tile(launch.MANY_ROWS) == launch.MANY_ROWS_DOWN
    assert launch.choose_down_tile(launch.FEW_ROWS) == launch.FEW_ROWS
    assert launch.choose_tile(1024, 8, 128, torch.float32) == launch.FLOAT32


def test_made_up_indices_read_nothing_outside():
    """A TensorRT builder times each kernel on such inputs; a read outside of them would end this process."""

    def made_up(like: torch.Tensor) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, like.shape).to(like.dtype)

    hidden, weights = torch.randn(63, 32), torch.randn(63, 8)
    gate_up_proj, down_proj = torch.randn(EXPERTS, 2 * 16, 32), torch.randn(EXPERTS, 32, 16)
    for _ in range(5):
        index = made_up(routed_to(63, RANDOM))
        row_order, tile_expert = alignment.align(index, EXPERTS, SMALL.rows).run()
        assert (tile_expert == -1).all()
        row_order, tile_expert = made_up(row_order), torch.randint(-2, EXPERTS + 2, tile_expert.shape).int()
        (activated,) = launch.gate_up(hidden, gate_up_proj, row_order, tile_expert, 8, SMALL).run()
        launch.down(activated.nan_to_num(), down_proj, weights, row_order, tile_expert, SMALL).run()
