"""The cases of `test_layer_kernels.py`, which runs this file in Triton's interpreter (TRITON_INTERPRET=1)."""

import pytest
import torch
from expert_formats import arranged, is_fp8
from tolerances import assert_close
from torch.nn.functional import gelu
from triton_interpreter import (
    let_casts_know_e4m3,
    let_casts_round_to_bfloat16,
    let_dot_read_bfloat16,
    let_empty_assembly_pass,
    save_the_interpreters_time,
)

from plugins.feed_forward import cuda, launch, spread_cuda
from plugins.feed_forward.mlp_launch import FEW_ROWS, activate_launch, mlp_beside
from plugins.feed_forward.reference import feed_forward_reference, gated_mlp
from plugins.feed_forward.spread import Spread
from plugins.feed_forward.spread_op import feed_forward_spread
from plugins.heads.launch import heads_launch, normed_heads
from plugins.heads.reference import heads_reference
from plugins.moe import fp8_launch
from plugins.moe import launch as moe_launch
from plugins.moe.formats import Format
from plugins.moe.fp8 import to_fp8
from plugins.moe.kernel_reference import combine_reference
from plugins.moe.kinds import RowsForm
from plugins.moe.packing import ROW_FACTOR
from plugins.rms_norm import rms_norm

let_dot_read_bfloat16()
let_casts_round_to_bfloat16()
let_casts_know_e4m3()
let_empty_assembly_pass()
save_the_interpreters_time()

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy's, about sigmoid of a large negative number: 1 / (1 + inf) = 0 is meant.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6
EXPERTS, TOP_K, WIDTH, DENSE_WIDTH = 8, 3, 12, 20


# -- Heads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_values", [True, False])
@pytest.mark.parametrize(
    ("tokens", "num_heads", "num_kv_heads", "head_dim"), [(1, 4, 1, 16), (5, 16, 8, 256), (3, 16, 2, 512), (7, 6, 3, 2)]
)
def test_heads(tokens, num_heads, num_kv_heads, head_dim, has_values, dtype):
    heads = torch.randn(tokens, (num_heads + num_kv_heads * (1 + has_values)) * head_dim).to(dtype) * 3
    q_norm, k_norm = torch.randn(2, head_dim).to(dtype)
    angles = torch.randn(tokens, 1, head_dim)
    rest = (q_norm, k_norm, angles.cos().to(dtype), angles.sin().to(dtype), num_kv_heads, has_values, EPS)
    query, new_kv = normed_heads(heads, *rest)
    expected_query, expected_kv = heads_reference(heads, *rest)
    assert query.dtype == new_kv.dtype == dtype
    assert_close(query, expected_query, dtype)
    assert_close(new_kv, expected_kv, dtype)


def test_a_program_never_has_heads_of_two_kinds():
    heads, cos = torch.empty(2, (16 + 2 * 8) * 256), torch.empty(2, 1, 256)
    launch = heads_launch(heads, cos[0, 0], cos[0, 0], cos, cos, 8, True, EPS)
    assert (launch.grid, launch.constants["HEADS"]) == ((2, 4), 8)
    heads, cos = torch.empty(2, (6 + 3) * 512), torch.empty(2, 1, 512)
    launch = heads_launch(heads, cos[0, 0], cos[0, 0], cos, cos, 3, False, EPS)
    assert (launch.grid, launch.constants["HEADS"]) == ((2, 12), 1)


def test_heads_of_another_width_are_refused():
    cos = torch.empty(2, 1, 24)
    with pytest.raises(ValueError, match="head_dim 24, expected a power of two"):
        heads_launch(torch.empty(2, 4 * 24), cos[0, 0], cos[0, 0], cos, cos, 1, True, EPS)


# -- Feed-forward


def operands(rows: int, columns: int, dtype: torch.dtype, *, fp8: bool = False) -> tuple:
    """All of the operator's tensors."""

    def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape) * scale).to(dtype)

    norms = [1 + tensor(columns, scale=0.1) for _ in range(7)]
    dense = [tensor(2 * DENSE_WIDTH, columns, scale=0.3), tensor(columns, DENSE_WIDTH, scale=0.3)]
    router = [tensor(columns) * 3, tensor(EXPERTS, columns), torch.rand(EXPERTS).to(dtype)]
    experts = [tensor(EXPERTS, 2 * WIDTH, columns, scale=0.3), tensor(EXPERTS, columns, WIDTH, scale=0.3)]
    if fp8:
        experts = [part for weights in experts for part in to_fp8(weights)]
    return tensor(rows, columns), tensor(rows, columns) * 2, norms, tensor(1), dense, router, experts


def check(given: tuple, fp8_rows: bool, *, exactly: bool, wanted: Format | None = None) -> None:
    """With weights in the format `wanted`, against the definition: exactly, or by the distance of both from the definition in
    float32, of rows in the middle.

    Elsewhere than in float32 a rounding in the router may choose another expert for some rows.
    """

    def distance(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return (rows.float() - others).pow(2).mean(1).sqrt().median()

    actual = launch.feed_forward(*given[:-1], arranged(given[-1], wanted), TOP_K, EPS, fp8_rows)
    expected = feed_forward_reference(*given, TOP_K, EPS, fp8_rows)
    wide = [[each.float() for each in part] if isinstance(part, list) else part.float() for part in given[:-1]]
    experts = given[-1] if len(given[-1]) == 4 else [each.float() for each in given[-1]]
    exact = feed_forward_reference(*wide, experts, TOP_K, EPS, False)
    for own, others, precise in zip(actual, expected, exact, strict=True):
        assert own.dtype == others.dtype
        if exactly:
            assert_close(own, others, own.dtype)
        else:
            assert distance(own, precise) <= 1.2 * distance(others, precise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (33, 40), (9, 130)])
def test_feed_forward(rows, columns, dtype):
    check(operands(rows, columns, dtype), False, exactly=dtype == torch.float32)


@pytest.mark.parametrize("fp8_rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_feed_forward_with_fp8_experts(dtype, fp8_rows):
    given, exactly = operands(33, 40, dtype, fp8=True), dtype == torch.float32 and not fp8_rows
    check(given, fp8_rows, exactly=exactly, wanted="narrow" if fp8_rows else "wide")


@pytest.mark.parametrize("rows", [1, 33])
def test_feed_forward_with_packed_experts(rows):
    check(operands(rows, 40, torch.bfloat16), False, exactly=False, wanted="packed")


@pytest.mark.parametrize(("wanted", "num_gpus", "rows"), [(None, 4, 1), ("packed", 2, 33), ("wide", 2, 5), ("narrow", 2, 5)])
def test_experts_that_devices_share_give_every_bit_of_those_of_one(wanted, num_gpus, rows):
    """One row's three experts are not on all of four devices."""
    *given, experts = operands(rows, 40, torch.bfloat16, fp8=is_fp8(wanted))
    experts, fp8_rows, devices = arranged(experts, wanted), wanted == "narrow", []
    expected = launch.feed_forward(*given, experts, TOP_K, EPS, fp8_rows)

    def run_there(device, work):
        devices.append(device)
        work()
        return lambda: devices.append("waited")

    own, *others = zip(*(each.chunk(num_gpus) for each in experts), strict=True)
    spread = Spread(others=others, run_there=run_there)
    actual = launch.feed_forward(*given, own, TOP_K, EPS, fp8_rows, take_rows=spread)
    assert devices == [torch.device("cpu")] * (2 * (num_gpus - 1)) + ["waited"] * (num_gpus - 1)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_the_cuda_path_of_shared_experts_gives_the_definition(monkeypatch):
    """All but its streams."""
    monkeypatch.setattr(cuda, "beside", lambda *mlp, priority: launch.in_turn(*mlp))
    monkeypatch.setattr(spread_cuda, "run_there", lambda device, work: work() or (lambda: None))
    *given, experts = operands(9, 16, torch.float32)
    parts = [each for part in zip(*(each.chunk(4) for each in experts), strict=True) for each in part]
    actual = spread_cuda.feed_forward_spread_cuda(*given, parts, 4, TOP_K, EPS, False)
    for own, others in zip(actual, feed_forward_reference(*given, experts, TOP_K, EPS, False), strict=True):
        assert_close(own, others, torch.float32)


def test_the_operator_of_shared_experts_is_that_of_all_of_them():
    for fp8 in (False, True):
        *given, experts = operands(5, 16, torch.float32, fp8=fp8)
        parts = [each for part in zip(*(each.chunk(2) for each in experts), strict=True) for each in part]
        expected = feed_forward_reference(*given, experts, TOP_K, EPS, False)
        actual = feed_forward_spread(*given, parts, 2, TOP_K, EPS, False)
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scalars", [1, 33])
def test_the_kernels_before_and_after(scalars, dtype):
    """A row of zeros has norms, too. One scalar, or one for each row."""
    hidden, attended, norms, _, _, router, _ = operands(33, 130, dtype)
    scalar = torch.randn(scalars).to(dtype)
    hidden[3] = attended[3] = 0
    residual, dense_rows, expert_rows, _, router_rows = launch.enter_launch(
        hidden, attended, norms[:3], router[0], RowsForm(dtype), EPS
    ).run()
    assert_close(residual, hidden + rms_norm(attended, norms[0], EPS), dtype)
    assert_close(dense_rows, rms_norm(residual, norms[1], EPS), dtype)
    assert_close(expert_rows, rms_norm(residual, norms[2], EPS), dtype)
    assert_close(router_rows, rms_norm(residual, None, EPS) * router[0] * 130**-0.5, dtype)
    dense, weighted = torch.randn(33, 130).to(dtype), torch.randn(33 * TOP_K, 130).to(dtype)
    output, normed = launch.leave_launch(residual, dense, weighted, scalar, norms[3:], TOP_K, EPS).run()
    mixed = rms_norm(dense, norms[3], EPS) + rms_norm(combine_reference(weighted, TOP_K), norms[4], EPS)
    assert_close(output, (residual + rms_norm(mixed, norms[5], EPS)) * scalar.unsqueeze(1), dtype)
    assert_close(normed, rms_norm(output, norms[6], EPS), dtype)


@pytest.mark.parametrize("rows_dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_rows_for_the_experts(rows_dtype):
    """As they are, with a scale of 1; times a power of two; or as the experts' own kernel scales them."""
    hidden, attended, norms, _, _, router, _ = operands(5, 40, torch.bfloat16)

    def enter(form: RowsForm) -> tuple[torch.Tensor, ...]:
        return launch.enter_launch(hidden, attended, norms[:3], router[0], form, EPS).run()

    plain, times = enter(RowsForm(torch.bfloat16)), enter(RowsForm(torch.bfloat16, factor=ROW_FACTOR))
    scaled = enter(RowsForm(rows_dtype, scaled=True))
    rows, scale = fp8_launch.scale_rows(plain[2], rows_dtype).run()
    assert torch.equal(scaled[2].float(), rows.float())
    assert torch.equal(scaled[3], scale)
    assert torch.equal(times[2].float(), plain[2].float() * ROW_FACTOR)
    assert plain[3].tolist() == times[3].tolist() == [1.0] * 5
    for other in (scaled, times):
        assert all(torch.equal(other[each], plain[each]) for each in (0, 1, 4))


@pytest.mark.parametrize("mlp_first", [True, False])
def test_the_mlp_is_started_before_the_router_or_after_it_and_waited_for_after_the_experts(mlp_first, monkeypatch):
    events = []

    def noted(event: str, function):
        return lambda *arguments, **options: (events.append(event), function(*arguments, **options))[1]

    def start(rows, gate_up, down):
        result = gated_mlp(rows, gate_up, down)
        return lambda: events.append("wait") or result

    given = operands(3, 16, torch.float32)
    expected, _ = launch.feed_forward(*given, TOP_K, EPS, False)
    for name in ("route", "gate_up", "down"):
        monkeypatch.setattr(moe_launch, name, noted(name, getattr(moe_launch, name)))
    output, _ = launch.feed_forward(*given, TOP_K, EPS, False, start_mlp=noted("start", start), mlp_first=mlp_first)
    assert events == [*(["start", "route"] if mlp_first else ["route", "start"]), "gate_up", "down", "wait"]
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("rows", "columns", "width", "dtype"),
    [
        (1, 130, 20, torch.bfloat16),
        (137, 130, 72, torch.bfloat16),
        (FEW_ROWS, 16, 20, torch.bfloat16),
        (9, 40, 20, torch.float32),
    ],
)
def test_mlp(rows, columns, width, dtype):
    given = [
        each.to(dtype) for each in (torch.randn(rows, columns), torch.randn(2 * width, columns), torch.randn(columns, width))
    ]
    actual, expected = mlp_beside(*given), gated_mlp(*given)
    assert actual.dtype == dtype
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 1100])
def test_activate(width, dtype):
    gate_up = (3 * torch.randn(5, 2 * width)).to(dtype)
    (activated,) = activate_launch(gate_up).run()
    gate, up = gate_up.chunk(2, dim=1)
    assert_close(activated, gelu(gate, approximate="tanh") * up, dtype)
