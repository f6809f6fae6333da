"""How the feed-forward operator runs on a GPU: two kernels around the products of the MLP and of the experts.

`feed_forward` is the whole operator; see the package's docstring for its arguments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from plugins.feed_forward.kernel import enter_kernel, leave_kernel
from plugins.feed_forward.reference import gated_mlp
from plugins.moe import launch
from plugins.moe.kinds import Kind, RowsForm, kind_of
from plugins.moe.launch import Tile
from plugins.triton_launch import Launch, Wrap, unwrapped

StartMlp = Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]
"""Starts the MLP of rows, gate_up and down; what it returns waits for the result. `in_turn`, or `plugins.feed_forward.cuda.beside`."""  # noqa: E501

_WARPS = 8


@dataclass(frozen=True, kw_only=True)
class Products:
    """Both products of a layer's experts, or of some of them: of their kind, in one tile, of rows in the model's dtype."""

    kind: Kind
    num_experts: int
    tile: Tile
    dtype: torch.dtype
    wrap: Wrap = unwrapped

    def order(
        self,
        experts: Sequence[Tensor],
        rows: tuple[Tensor, Tensor],
        top_k_weights: Tensor,
        top_k_index: Tensor,
        weighted: Tensor | None = None,
    ) -> Callable[[], Tensor]:
        """Orders the rows by expert; what it returns multiplies them. weighted: see `plugins.moe.launch.Routing`."""
        num_here = experts[0].shape[0]
        to_where = {"num_elsewhere": self.num_experts - num_here, "weighted": weighted}
        routing = launch.route(top_k_index, top_k_weights, num_here, self.tile, self.wrap, **to_where)
        return partial(self.kind.weighted_rows, rows, routing, experts, self.dtype, tile=self.tile, wrap=self.wrap)


OrderRows = Callable[[Tensor, Tensor], Callable[[], Tensor]]
"""Given top_k_weights and top_k_index, orders rows by expert; what it returns multiplies them: weighted [N * k, D]."""

TakeRows = Callable[[Products, Sequence[Tensor], tuple[Tensor, Tensor]], OrderRows]
"""Given experts and rows, before it is known which go where: `in_one_place`, or `plugins.feed_forward.spread.Spread`."""


def in_one_place(products: Products, experts: Sequence[Tensor], rows: tuple[Tensor, Tensor]) -> OrderRows:
    return partial(products.order, experts, rows)


def in_turn(rows: Tensor, gate_up: Tensor, down: Tensor) -> Callable[[], Tensor]:
    result = gated_mlp(rows, gate_up, down)
    return lambda: result


def enter_launch(
    hidden: Tensor, attended: Tensor, norms: Sequence[Tensor], router_scale: Tensor, form: RowsForm, eps: float
) -> Launch:
    """norms: post_attention, pre_dense, pre_experts. form: of expert_rows.

    Outputs residual, dense_rows, expert_rows, row_scale and router_rows.
    """
    num_rows, columns = hidden.shape
    residual, dense_rows, router_rows = (torch.empty_like(hidden) for _ in range(3))
    expert_rows = hidden.new_empty(num_rows, columns, dtype=form.dtype)
    return Launch(
        kernel=enter_kernel,
        grid=(num_rows,),
        inputs=(hidden, attended, *norms, router_scale),
        scalars=(),
        outputs=(residual, dense_rows, expert_rows, hidden.new_empty(num_rows, dtype=torch.float32), router_rows),
        constants={
            "COLUMNS": columns,
            "EPS": eps,
            "SCALED": form.scaled,
            "FACTOR": form.factor,
            "BLOCK": triton.next_power_of_2(columns),
        },
        num_warps=_WARPS,
        num_stages=1,
    )


def leave_launch(
    residual: Tensor, dense: Tensor, weighted: Tensor, scalar: Tensor, norms: Sequence[Tensor], top_k: int, eps: float
) -> Launch:
    """norms: post_dense, post_experts, post_feed_forward, next. Outputs output and normed."""
    num_rows, columns = residual.shape
    return Launch(
        kernel=leave_kernel,
        grid=(num_rows,),
        inputs=(residual, dense, weighted, scalar, *norms),
        scalars=(),
        outputs=(torch.empty_like(residual), torch.empty_like(residual)),
        constants={
            "COLUMNS": columns,
            "TOP_K": top_k,
            "EPS": eps,
            "SCALAR_STRIDE": int(scalar.shape[0] > 1),
            "BLOCK": triton.next_power_of_2(columns),
        },
        num_warps=_WARPS,
        num_stages=1,
    )


def choose_tile(num_rows: int, top_k: int, experts: Sequence[Tensor], dtype: torch.dtype, fp8_rows: bool) -> Tile:
    """The tile of the experts' products; see `plugins.moe`."""
    return kind_of(experts, fp8_rows).choose_tile(num_rows, top_k, experts[0].shape[0], dtype)


def feed_forward(
    hidden: Tensor,
    attended: Tensor,
    norms: Sequence[Tensor],
    scalar: Tensor,
    dense: Sequence[Tensor],
    router: Sequence[Tensor],
    experts: Sequence[Tensor],
    top_k: int,
    eps: float,
    fp8_rows: bool,
    *,
    tile: Tile | None = None,
    start_mlp: StartMlp = in_turn,
    mlp_first: bool = True,
    take_rows: TakeRows = in_one_place,
    wrap: Wrap = unwrapped,
) -> tuple[Tensor, Tensor]:
    """The operator, on the current stream; waits for nothing.

    1. Sum and norms before. 2. The router, and what the experts need of it. 3. The experts. 4. Norms and sums after, once all
    is there. The MLP is started before 2. if `mlp_first`, else before 3.
    """
    router_scale, projection, per_expert_scale = router
    kind, num_experts = kind_of(experts, fp8_rows), projection.shape[0]
    tile = tile or kind.choose_tile(hidden.shape[0], top_k, num_experts, hidden.dtype)
    products = Products(kind=kind, num_experts=num_experts, tile=tile, dtype=hidden.dtype, wrap=wrap)
    # 1.
    form = kind.rows_form(hidden.dtype)
    entering = enter_launch(hidden.contiguous(), attended.contiguous(), norms[:3], router_scale, form, eps)
    residual, dense_rows, expert_rows, row_scale, router_rows = entering.run(wrap)
    # 2.
    order_rows = take_rows(products, experts, (expert_rows, row_scale))
    from_dense = start_mlp(dense_rows, *dense) if mlp_first else None
    (logits,) = launch.router_logits(router_rows, projection).run(wrap)
    chosen = launch.router(logits, per_expert_scale, top_k, hidden.dtype).run(wrap)
    from_experts = order_rows(*chosen)
    # 3.
    from_dense = from_dense or start_mlp(dense_rows, *dense)
    weighted = from_experts()
    # 4.
    output, normed = leave_launch(residual, from_dense(), weighted, scalar, norms[3:], top_k, eps).run(wrap)
    return output, normed
