"""What the passes of a model take in memory beside weights and KV pages, estimated from the sizes of their largest tensors.

    denoise, encode   per row: the residual and its norms; then, whichever is more, queries, keys, values and what attention
                      makes of them, or the gated MLP and the experts' routed rows (on a GPU both, which run side by side)
    encode            the new keys and values of every layer as well, until they are in their pages
    vision            of one image
    head              a chunk of rows times the vocabulary, several times while tokens are sampled

The experts' routed rows are most of it. On the CPU the operators in C++ store only the second product, the others, for
bfloat16, gather them, multiply, put back in order and widen for the sum; on a GPU both products are stored. The CPU's figure is
compared with what the passes allocate in `tests/test_planner.py`; the GPU's with a step of 64 canvases of the 26B shape on an
H200: 2.05 GB, where 2.03 were taken; with FP8 experts 2.15 and 2.07.
"""

import torch

from backend.parameters import MOST_ALTERNATIVES
from contract.manifest import BuildConfig
from contract.model_config import SOFT_TOKEN_BUDGETS, LayerType, ModelConfig
from plugins.vocabulary.tables import num_words

_STATE_BYTES_PER_POSITION = 64  # canvas, argmax canvas, and room for what sampling options keep

LOGITS_COPIES = 6
"""float32 tensors of the size of a head chunk's logits that are alive at once in a step of `CanvasLoop`: raw, processed, noise,
temporaries (filters have two and a half)."""


def item_bytes(dtype: str) -> int:
    """Of PyTorch's dtype of this name."""
    return getattr(torch, dtype).itemsize


def token_bytes(model: ModelConfig, kind: LayerType, dtype: str) -> int:
    """Keys and values of a token in all layers of a type."""
    attention = model.attention[kind]
    return model.layer_types.count(kind) * 2 * attention.num_kv_heads * attention.head_dim * item_bytes(dtype)


def state_bytes(model: ModelConfig, build: BuildConfig) -> int:
    """Of a sequence in the canvas loop, with its rows in the tables of `extras_tables`."""
    of_tables = model.canvas_length * (4 + MOST_ALTERNATIVES * 12) + 4 * model.vocab_size + 4 * num_words(model.vocab_size)
    of_position = model.hidden_size * item_bytes(build.dtype) + _STATE_BYTES_PER_POSITION
    return model.canvas_length * of_position + 2 * of_tables


def denoise_bytes(model: ModelConfig, build: BuildConfig, rows: int, device_type: str) -> int:
    """Of a denoising pass over so many canvas positions."""
    return rows * _row_bytes(model, build, device_type) + _expert_bytes(model, build, device_type)


def encode_bytes(model: ModelConfig, build: BuildConfig, device_type: str) -> int:
    """Of the largest encode pass. Its last layer ends with keys and values: they come when no other layer's MLP is there."""
    last = model.layer_types[-1]
    new_kv = sum(token_bytes(model, kind, build.dtype) for kind in model.attention)
    new_kv -= token_bytes(model, last, build.dtype) // model.layer_types.count(last)
    return build.max_encode_tokens * (_row_bytes(model, build, device_type) + new_kv) + _expert_bytes(model, build, device_type)


def vision_bytes(model: ModelConfig, build: BuildConfig) -> int:
    """Of the largest image: a layer's tensors; its heads are filled up to a power of two for the attention kernels."""
    if model.vision is None:
        return 0
    vision = model.vision
    patches = min(SOFT_TOKEN_BUDGETS[-1], build.max_encode_tokens) * vision.pooling_kernel_size**2
    heads = vision.num_attention_heads * (1 << (vision.head_dim - 1).bit_length())
    return patches * (8 * vision.hidden_size + 3 * vision.intermediate_size + 5 * heads) * item_bytes(build.dtype)


def expert_rows_bytes(model: ModelConfig, build: BuildConfig) -> int:
    """Of a row of a pass on a GPU that has experts and nothing else: the row, what the router chose for it, and what the first
    product makes of it."""
    routed, item = model.top_k_experts, item_bytes(build.dtype)
    return model.hidden_size * item + routed * (16 + model.moe_intermediate_size * item) + _scaled_bytes(model)


def _scaled_bytes(model: ModelConfig) -> int:
    """Of a row's routed rows, made ready for the second product of FP8 weights."""
    if model.experts_dtype != "float8_e4m3fn":
        return 0
    return model.top_k_experts * (model.moe_intermediate_size * item_bytes(model.experts_dtype) + 4)


def head_row_bytes(model: ModelConfig, build: BuildConfig, *, plain: bool) -> int:
    """Of a row of a head chunk and what is sampled from it. plain: in `CanvasLoop` itself; a `TableLoop` keeps the logits and
    nothing else of their size."""
    return model.vocab_size * (4 * LOGITS_COPIES if plain else item_bytes(build.dtype))


def sampler_bytes(model: ModelConfig, build: BuildConfig, most_bytes: int, *, plain: bool) -> int:
    """Of the largest head chunk and what is sampled from it; at most `most_bytes`, unless a row is more."""
    row_bytes = head_row_bytes(model, build, plain=plain)
    return max(row_bytes, min(most_bytes, build.max_head_rows * row_bytes))


def _expert_bytes(model: ModelConfig, build: BuildConfig, device_type: str) -> int:
    """Of one expert's first weight while a CPU unpacks it, as PyTorch was seen to allocate. Operators in C++, which there are
    for float32 and none for FP8, unpack 64 rows at a time."""
    stored = model.experts_dtype or build.expert_weights
    if device_type != "cpu" or (build.dtype == "float32" and stored != "float8_e4m3fn"):
        return 0
    of_number = {"plain": 0, "packed": 22, "int4": 8, "nvfp4": 24, "float8_e4m3fn": 8}[stored]
    return of_number * 2 * model.moe_intermediate_size * model.hidden_size


def _row_bytes(model: ModelConfig, build: BuildConfig, device_type: str) -> int:
    item, routed = item_bytes(build.dtype), model.top_k_experts
    hidden, width = model.hidden_size, model.moe_intermediate_size
    if device_type != "cpu":
        # Ten tensors like the residual: the sum before and after, four kinds of normed rows, the attention's and the MLP's
        # results, the pass's input and output.
        return (10 * hidden + 3 * model.intermediate_size + routed * (hidden + width)) * item + _scaled_bytes(model)
    dense = 2 * model.intermediate_size * item
    if build.dtype == "float32":
        # The dense MLP's result is there, its inner tensors are not; an index and a weight for each routed row.
        mlp = max(dense, hidden * item + routed * (hidden * item + 12))
    else:
        mlp = dense + routed * (3 * hidden * item + hidden * 4)
    attention = max(
        (3 * model.num_attention_heads + 4 * each.num_kv_heads) * each.head_dim * item for each in model.attention.values()
    )
    return 5 * hidden * item + max(mlp, attention)
