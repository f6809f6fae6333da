"""The definition of the feed-forward operator."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import gelu, linear

from plugins.moe import op as moe_op
from plugins.rms_norm import rms_norm


def feed_forward_reference(
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
) -> tuple[Tensor, Tensor]:
    """See the package's docstring."""
    post_attention, pre_dense, pre_experts, post_dense, post_experts, post_feed_forward, following = norms
    residual = hidden + rms_norm(attended, post_attention, eps)
    from_dense = gated_mlp(rms_norm(residual, pre_dense, eps), *dense)
    # The router reads the residual, not the experts' normed input.
    top_k_weights, top_k_index = route(residual, *router, top_k, eps)
    routed = (rms_norm(residual, pre_experts, eps), top_k_index, top_k_weights)
    from_experts = moe_op.experts(*routed, *experts) if len(experts) == 2 else moe_op.experts_fp8(*routed, *experts, fp8_rows)
    mixed = rms_norm(from_dense, post_dense, eps) + rms_norm(from_experts, post_experts, eps)
    of_row = scalar if scalar.shape[0] == 1 else scalar.unsqueeze(1)
    output = (residual + rms_norm(mixed, post_feed_forward, eps)) * of_row
    return output, rms_norm(output, following, eps)


def gated_mlp(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down(gelu_tanh(gate(x)) * up(x))."""
    gate, up = linear(rows, gate_up).chunk(2, dim=-1)
    return linear(gelu(gate, approximate="tanh") * up, down)


def route(
    residual: Tensor, scale: Tensor, projection: Tensor, per_expert_scale: Tensor, top_k: int, eps: float
) -> tuple[Tensor, Tensor]:
    """top_k_weights [N, k] float32 and top_k_index [N, k] int64 for rows of the residual [N, D]."""
    scaled = rms_norm(residual, None, eps) * scale
    # The factor is not rounded to the engine's dtype; ONNX, where both factors have one dtype, would round it.
    scaled = (scaled.float() * residual.shape[-1] ** -0.5).to(residual.dtype)
    return moe_op.choose_experts(linear(scaled, projection), per_expert_scale, top_k)
