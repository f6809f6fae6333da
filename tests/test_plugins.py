"""Every operator against its reference, on awkward shapes; memory that must not be read is poisoned with NaN."""

import pytest
import torch
from tolerances import assert_close

from plugins import attention_op, moe_op
from plugins.attention.reference import paged_attention_reference
from plugins.moe.fp8 import to_fp8
from plugins.moe.fp8_reference import experts_fp8_reference
from plugins.moe.reference import experts_reference

DTYPES = [torch.float32, torch.bfloat16]


def attention_inputs(*, prefixes, counts, heads, kv_heads, head_dim, page_size, window, images=False, dtype=torch.float32):
    """Random inputs; pages that no row may read are NaN, also those that left the window."""
    torch.manual_seed(0)
    total = sum(counts)
    columns = max(1, max(-(-prefix // page_size) for prefix in prefixes))
    num_pages = len(prefixes) * columns + 3
    page_table = torch.randperm(num_pages)[: len(prefixes) * columns].view(len(prefixes), columns).int()
    kv_pages = torch.full((num_pages, page_size, 2, kv_heads, head_dim), float("nan"), dtype=dtype)
    for sequence, prefix in enumerate(prefixes):
        for position in range(max(0, prefix - window + 1) if window else 0, prefix):
            page = page_table[sequence, position // page_size]
            kv_pages[page, position % page_size] = torch.randn(2, kv_heads, head_dim)
    blocks = torch.full((total,), -1, dtype=torch.int32)
    if images:
        blocks[total // 4 : total // 2], blocks[total // 2 : total // 2 + 2] = 0, 1
    return (
        torch.randn(total, heads, head_dim).to(dtype) * 0.5,
        torch.randn(total, 2, kv_heads, head_dim).to(dtype),
        kv_pages,
        page_table,
        torch.tensor(prefixes, dtype=torch.int32),
        torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        blocks,
    )


def behind(inputs, cut):
    """Inputs for one sequence, nothing of it cached → those for its tokens from `cut` on, the others cached."""
    query, new_kv, kv_pages, *_, images = inputs
    page_size = kv_pages.shape[1]
    pages = new_kv.new_full((-(-cut // page_size), page_size, *new_kv.shape[1:]), float("nan"))
    pages.flatten(0, 1)[:cut] = new_kv[:cut]
    lengths = (torch.tensor([cut], dtype=torch.int32), torch.tensor([0, len(query) - cut], dtype=torch.int32))
    return query[cut:], new_kv[cut:], pages, torch.arange(len(pages), dtype=torch.int32)[None], *lengths, images[cut:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        {"prefixes": [0], "counts": [1], "window": 0},
        {"prefixes": [0], "counts": [63], "window": 16},
        {"prefixes": [5], "counts": [1], "window": 4},
        {"prefixes": [100, 0, 15, 16, 17], "counts": [8, 3, 1, 20, 5], "window": 16},
        {"prefixes": [257, 1], "counts": [40, 40], "window": 0},
        {"prefixes": [31], "counts": [64], "window": 32},
    ],
    ids=str,
)
def test_attention_equals_reference(case, causal, dtype):
    for heads, kv_heads, head_dim, page_size in ((4, 2, 16, 8), (6, 1, 32, 16), (2, 2, 8, 1)):
        inputs = attention_inputs(
            **case, heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype, images=causal
        )
        actual = attention_op.paged_attention(*inputs, causal, case["window"])
        assert_close(actual, paged_attention_reference(*inputs, causal, case["window"]), dtype)


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("cuts", [(40, 70), (1, 39, 75), (32,)], ids=str)
def test_attention_to_an_image_is_the_same_to_the_bit_however_the_text_is_cut(cuts, window):
    """100 tokens with an image from 40 to 70, in one pass and in passes that cut no image; another sequence goes with one."""
    query, new_kv, kv_pages, page_table, *_ = attention_inputs(
        prefixes=[100], counts=[100], heads=4, kv_heads=2, head_dim=16, page_size=8, window=0
    )
    blocks = torch.full((100,), -1, dtype=torch.int32)
    blocks[40:70] = 3

    def attended(start: int, end: int) -> torch.Tensor:
        of_another = 5 if start else 0
        rows = [torch.cat([each[start:end], each[:of_another]]) for each in (query, new_kv, blocks)]
        prefixes = torch.tensor([start, 0], dtype=torch.int32)
        starts = torch.tensor([0, end - start, end - start + of_another], dtype=torch.int32)
        tables = page_table.expand(2, -1).contiguous()
        inputs = (rows[0], rows[1], kv_pages, tables, prefixes, starts, rows[2])
        return attention_op.paged_attention(*inputs, True, window)[: end - start]

    positions = torch.arange(100)
    kv_pages[page_table[0].long()[positions // 8], positions % 8] = new_kv
    whole = attended(0, 100)
    passes = zip((0, *cuts), (*cuts, 100), strict=True)
    assert torch.equal(torch.cat([attended(*each) for each in passes]), whole)


def test_attention_of_the_canvas_has_no_window_of_its_own():
    """Every row of a canvas sees the same last window - 1 cached tokens, however far it is into the canvas."""
    inputs = attention_inputs(prefixes=[40], counts=[32], heads=2, kv_heads=1, head_dim=8, page_size=8, window=16)
    query, new_kv, kv_pages, *rest = inputs
    query[:] = query[0]
    attended = attention_op.paged_attention(query, new_kv, kv_pages, *rest, False, 16)
    assert_close(attended, attended[:1].expand_as(attended), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 63, 257])
@pytest.mark.parametrize("routing", ["random", "all rows to the same experts", "one expert"])
def test_experts_equal_reference(rows, routing, dtype):
    torch.manual_seed(1)
    experts, hidden, width = 16, 24, 12
    top_k = 1 if routing == "one expert" else 8
    index = torch.rand(rows, experts).topk(top_k).indices
    if routing != "random":
        index = index[:1].expand_as(index).contiguous()
    weights = torch.rand(rows, top_k)
    gate_up, down = torch.randn(experts, 2 * width, hidden) * 0.3, torch.randn(experts, hidden, width) * 0.3
    unused = sorted(set(range(experts)) - set(index.unique().tolist()))
    gate_up[unused] = down[unused] = float("nan")
    inputs = (torch.randn(rows, hidden).to(dtype), index, weights, gate_up.to(dtype), down.to(dtype))
    assert_close(moe_op.experts(*inputs), experts_reference(*inputs), dtype)


@pytest.mark.parametrize("fp8_rows", [False, True], ids=["full rows", "FP8 rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 63])
def test_fp8_experts_equal_reference(rows, dtype, fp8_rows):
    torch.manual_seed(1)
    experts, hidden, width = 16, 24, 12
    index = torch.rand(rows, experts).topk(8).indices
    gate_up, gate_up_scale = to_fp8(torch.randn(experts, 2 * width, hidden) * 0.3)
    down, down_scale = to_fp8(torch.randn(experts, hidden, width) * 0.3)
    unused = sorted(set(range(experts)) - set(index.unique().tolist()))
    gate_up_scale[unused] = down_scale[unused] = float("nan")
    rows_read = (torch.randn(rows, hidden).to(dtype), index, torch.rand(rows, 8))
    inputs = (*rows_read, gate_up, gate_up_scale, down, down_scale, fp8_rows)
    actual = moe_op.experts_fp8(*inputs)
    assert actual.dtype == dtype
    assert_close(actual, experts_fp8_reference(*inputs), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_of_no_rows(dtype):
    rows = (torch.empty(0, 24, dtype=dtype), torch.empty(0, 8, dtype=torch.int64), torch.empty(0, 8))
    weights = torch.randn(16, 2 * 12, 24), torch.randn(16, 24, 12)
    quantized = [part for weight in weights for part in to_fp8(weight)]
    results = [moe_op.experts(*rows, *(weight.to(dtype) for weight in weights))]
    results += [moe_op.experts_fp8(*rows, *quantized, fp8_rows) for fp8_rows in (False, True)]
    assert [(tuple(each.shape), each.dtype) for each in results] == [((0, 24), dtype)] * 3


def test_numbers_of_fp8():
    """The largest of a vector becomes 448, halves are rounded to even, and a vector of zeros has a scale."""
    numbers, scale = to_fp8(torch.tensor([[448.0, 17.0, 19.0, -(2.0**-9)], [0.0, 0.0, 0.0, 0.0], [-896.0, 2.0**-8, 1.0, 0.0]]))
    assert scale[0] == 1 and scale[2] == 2 and 0 < scale[1] < 1e-30
    assert numbers.float().tolist() == [[448.0, 16.0, 20.0, -(2.0**-9)], [0.0] * 4, [-448.0, 2.0**-9, 0.5, 0.0]]


def test_operators_describe_their_results_to_the_compiler():
    """Shapes, dtypes and strides promised while tracing are those at run time, and inputs are not modified."""
    attention = attention_inputs(prefixes=[9, 3], counts=[5, 6], heads=4, kv_heads=2, head_dim=8, page_size=4, window=0)
    moe = (torch.randn(5, 6), torch.rand(5, 16).topk(8).indices, torch.rand(5, 8), torch.randn(16, 8, 6), torch.randn(16, 6, 4))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(attention_op.paged_attention, (*attention, True, 4), test_utils=checks)
    torch.library.opcheck(moe_op.experts, moe, test_utils=checks)
    (gate_up, gate_up_scale), (down, down_scale) = map(to_fp8, moe[3:])
    quantized = (*moe[:3], gate_up, gate_up_scale, down, down_scale)
    for fp8_rows in (False, True):  # PyTorch's check of the schema compares inputs, and cannot compare FP8
        torch.library.opcheck(moe_op.experts_fp8, (*quantized, fp8_rows), test_utils="test_faketensor")
