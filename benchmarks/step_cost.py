"""The fewest bytes and operations of one denoising step, counted from the model's sizes.

Counted: every matrix product and the attention, two operations a multiply and add; every weight that the step needs read once,
the embedding twice (for the logits, and for the soft embeddings), and the cached keys and values. Not counted: activations and
logits, which may stay in caches, and what is not a product: norms, the softmax over the vocabulary, noise.
"""

import math
from dataclasses import dataclass

from builder.weights import EMBEDDING, text_weights
from contract.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Of one step of a batch. operations: by part."""

    read_bytes: int
    operations: dict[str, int]

    def floor_s(self, bandwidth: float, rate: float) -> float:
        """Seconds below which no program gets. bandwidth: bytes a second; rate: operations a second."""
        return max(self.read_bytes / bandwidth, sum(self.operations.values()) / rate)


def step_cost(model: ModelConfig, *, batch: int, prefix: int, item_bytes: int = 4) -> StepCost:
    """Of `batch` canvases with `prefix` cached tokens each."""
    rows, hidden = batch * model.canvas_length, model.hidden_size
    shapes = text_weights(model)
    routed = rows * model.top_k_experts
    read_items = shapes[EMBEDDING][0] * hidden
    for name, shape in shapes.items():
        touched = min(1.0, routed / model.num_experts) if ".experts." in name else 1.0
        read_items += int(touched * math.prod(shape))
    operations = dict.fromkeys(("attention", "dense", "experts", "vocabulary"), 0)
    for layer_type in model.layer_types:
        attention = model.attention[layer_type]
        queries, keys = (count * attention.head_dim for count in (model.num_attention_heads, attention.num_kv_heads))
        cached = min(prefix, attention.window - 1) if attention.window else prefix
        projected = 2 * queries + (2 if attention.has_v_proj else 1) * keys
        operations["dense"] += 2 * rows * hidden * (projected + 3 * model.intermediate_size + model.num_experts)
        operations["attention"] += 4 * rows * queries * (cached + model.canvas_length)
        operations["experts"] += 2 * routed * 3 * hidden * model.moe_intermediate_size
        read_items += batch * cached * 2 * keys
    operations["dense"] += 2 * rows * 3 * hidden * model.intermediate_size  # self-conditioning
    operations["vocabulary"] = 2 * 2 * rows * hidden * model.vocab_size  # logits, soft embeddings
    return StepCost(read_bytes=item_bytes * read_items, operations=operations)
