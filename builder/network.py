"""The network in plain PyTorch: three pure programs over (activations, weights).

Shape legend: T packed tokens, B sequences, C canvas_length, D hidden_size, V vocabulary, H query heads, K key/value heads,
P page-table columns, R rows. Activations are in the engine's dtype; norms, softmaxes and rotations compute in float32 where
transformers' `modeling_diffusion_gemma.py` does, and round where it rounds.

| program | activations | result |
|---|---|---|
| encode | token_ids [T], positions [T], sequence_starts [B + 1], prefix_lengths [B], page tables, image inputs, KV pages | new keys and values of every layer, [T, 2, K, head_dim] each |
| denoise | canvas_ids [B, C], soft_embeds [B, C, D], prefix_lengths [B], page tables, KV pages | final-norm hidden states [B, C, D] |
| head | hidden [R, D] | raw logits [R, V] |
"""  # noqa: E501

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from builder.weights import EMBEDDING, FINAL_NORM, SELF_CONDITIONING, layer_prefix, layer_scalar
from contract.model_config import LayerType, ModelConfig
from plugins import attention_op, moe_op

Tensors = Mapping[str, Tensor]


class Encode(nn.Module):
    """The causal pass over a prompt's chunk or a finished canvas. There is no head: only keys and values come out."""

    def __init__(self, config: ModelConfig, *, fp8_rows: bool = False):
        super().__init__()
        self.stack = _Stack(config, encoder=True, fp8_rows=fp8_rows)

    def forward(self, inputs: Tensors, weights: Tensors) -> list[Tensor]:
        hidden = self.stack.embed(inputs["token_ids"], weights)
        image_index = inputs["image_index"].long()
        is_image = (image_index >= 0).unsqueeze(1)
        image_rows = inputs["image_embeds"].index_select(0, image_index.clamp(min=0))
        hidden = torch.where(is_image, image_rows, hidden)
        _, new_kv = self.stack(
            hidden, inputs["positions"], inputs["sequence_starts"], inputs["image_block_ids"], inputs, weights
        )
        return new_kv


class Denoise(nn.Module):
    """One bidirectional pass over the canvases."""

    def __init__(self, config: ModelConfig, *, fp8_rows: bool = False):
        super().__init__()
        self.stack = _Stack(config, encoder=False, fp8_rows=fp8_rows)
        self.eps = config.rms_norm_eps

    def forward(self, inputs: Tensors, weights: Tensors) -> Tensor:
        canvas_ids = inputs["canvas_ids"]
        batch, length = canvas_ids.shape
        hidden = self.stack.embed(canvas_ids.flatten(), weights)
        hidden = self._self_condition(hidden, inputs["soft_embeds"].flatten(0, 1), weights)
        within = torch.arange(length, dtype=torch.int32, device=canvas_ids.device)
        positions = (inputs["prefix_lengths"].unsqueeze(1) + within).flatten()
        starts = torch.arange(batch + 1, dtype=torch.int32, device=canvas_ids.device) * length
        hidden, _ = self.stack(hidden, positions, starts, torch.full_like(positions, -1), inputs, weights)
        hidden = rms_norm(hidden, weights[FINAL_NORM], self.eps)
        return hidden.view(batch, length, -1)

    def _self_condition(self, hidden: Tensor, soft_embeds: Tensor, weights: Tensors) -> Tensor:
        """Adds the gated MLP of the previous step's soft embeddings; zeros in, zeros added."""
        normed = rms_norm(soft_embeds, weights[f"{SELF_CONDITIONING}.pre_norm.weight"], self.eps)
        return rms_norm(hidden + _gated_mlp(normed, SELF_CONDITIONING, weights), None, self.eps)


class Head(nn.Module):
    """Rows of hidden states → raw logits over the vocabulary, in the engine's dtype, not yet soft-capped."""

    def forward(self, inputs: Tensors, weights: Tensors) -> Tensor:
        return linear(inputs["hidden"], weights[EMBEDDING])


class _Stack(nn.Module):
    """The layers, shared by encode (causal) and denoise."""

    def __init__(self, config: ModelConfig, *, encoder: bool, fp8_rows: bool):
        super().__init__()
        self.config, self.encoder, self.fp8_rows = config, encoder, fp8_rows
        for layer_type, attention in config.attention.items():
            self.register_buffer(f"{layer_type}_frequencies", rope_frequencies(attention), persistent=False)

    def embed(self, token_ids: Tensor, weights: Tensors) -> Tensor:
        """Embedding times sqrt(D), the factor rounded to the engine's dtype first: [T] → [T, D]."""
        embedding = weights[EMBEDDING]
        scale = torch.tensor(self.config.hidden_size**0.5).to(embedding.dtype).item()
        return embedding.index_select(0, token_ids.long()) * scale

    def forward(
        self, hidden: Tensor, positions: Tensor, starts: Tensor, image_blocks: Tensor, inputs: Tensors, weights: Tensors
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the last layer's hidden states [T, D] and each layer's new keys and values [T, 2, K, head_dim]."""
        rotations = {
            layer_type: rotation(positions, getattr(self, f"{layer_type}_frequencies"), hidden.dtype)
            for layer_type in self.config.attention
        }
        new_kv = []
        for layer, layer_type in enumerate(self.config.layer_types):
            prefix, eps = layer_prefix(layer), self.config.rms_norm_eps

            def normed(rows: Tensor, name: str, prefix: str = prefix) -> Tensor:
                return rms_norm(rows, weights[f"{prefix}.{name}.weight"], self.config.rms_norm_eps)

            # Attention.
            query, kv = self._project(normed(hidden, "input_layernorm"), layer, layer_type, rotations[layer_type], weights)
            new_kv.append(kv)
            attended = attention_op.paged_attention(
                query,
                kv,
                inputs[f"kv_pages.{layer}"],
                inputs[f"{layer_type}.page_table"],
                inputs["prefix_lengths"],
                starts,
                image_blocks,
                self.encoder,
                self.config.attention[layer_type].window,
            )
            attended = linear(attended.flatten(1), weights[f"{prefix}.self_attn.o_proj.weight"])
            hidden = hidden + normed(attended, "post_attention_layernorm")

            # Dense MLP and experts side by side; the router reads the residual, not the experts' normed input.
            dense = _gated_mlp(normed(hidden, "pre_feedforward_layernorm"), f"{prefix}.mlp", weights)
            top_k_weights, top_k_index = route(hidden, f"{prefix}.router", self.config.top_k_experts, eps, weights)
            routed = (normed(hidden, "pre_feedforward_layernorm_2"), top_k_index, top_k_weights)
            sparse = self._experts(routed, f"{prefix}.experts", weights)
            mixed = normed(dense, "post_feedforward_layernorm_1") + normed(sparse, "post_feedforward_layernorm_2")
            hidden = hidden + normed(mixed, "post_feedforward_layernorm")
            hidden = hidden * weights[layer_scalar(layer, encoder=self.encoder)]
        return hidden, new_kv

    def _experts(self, routed: tuple[Tensor, Tensor, Tensor], prefix: str, weights: Tensors) -> Tensor:
        if self.config.experts_dtype is None:
            return moe_op.experts(*routed, weights[f"{prefix}.gate_up_proj"], weights[f"{prefix}.down_proj"])
        quantized = (
            weights[f"{prefix}.{name}"] for name in ("gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale")
        )
        return moe_op.experts_fp8(*routed, *quantized, self.fp8_rows)

    def _project(
        self, rows: Tensor, layer: int, layer_type: LayerType, rotated_by: tuple[Tensor, Tensor], weights: Tensors
    ) -> tuple[Tensor, Tensor]:
        """Normed, rotated queries [T, H, head_dim] and keys with values [T, 2, K, head_dim]."""
        attention, eps, prefix = self.config.attention[layer_type], self.config.rms_norm_eps, f"{layer_prefix(layer)}.self_attn"

        counts = [self.config.num_attention_heads] + [attention.num_kv_heads] * (1 + attention.has_v_proj)
        heads = linear(rows, weights[f"{prefix}.qkv_proj.weight"]).unflatten(1, (-1, attention.head_dim))
        query, key, *values = heads.split(counts, dim=1)
        # Full-attention layers have no v_proj: the value is the key before its norm and rotation.
        value = rms_norm(*(values or [key]), None, eps)
        query = rotate(rms_norm(query, weights[f"{prefix}.q_norm.weight"], eps), *rotated_by)
        key = rotate(rms_norm(key, weights[f"{prefix}.k_norm.weight"], eps), *rotated_by)
        return query, torch.stack([key, value], dim=1)


def rms_norm(rows: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded to the dtype of `rows`."""
    wide = rows.float()
    normed = wide * ((wide * wide).mean(-1, keepdim=True) + eps).rsqrt()
    return (normed if weight is None else normed * weight.float()).to(rows.dtype)


def rope_frequencies(attention) -> Tensor:
    """[head_dim / 2] float32: theta ** (-2 i / head_dim) for the turning angle pairs, then zeros."""
    turning = torch.arange(0, 2 * attention.rope.num_angles, 2, dtype=torch.int64).float()
    frequencies = 1.0 / (attention.rope.theta ** (turning / attention.head_dim))
    return torch.cat([frequencies, torch.zeros(attention.head_dim // 2 - attention.rope.num_angles)])


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, head_dim] for `rotate`."""
    angles = positions.float().unsqueeze(1) * frequencies
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + head_dim / 2): [T, heads, head_dim]."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def route(hidden: Tensor, prefix: str, top_k: int, eps: float, weights: Tensors) -> tuple[Tensor, Tensor]:
    """top_k_weights [N, k] float32 and top_k_index [N, k] int64 for rows of the residual [N, D]."""
    scaled = rms_norm(hidden, None, eps) * weights[f"{prefix}.scale"]
    # The factor is not rounded to the engine's dtype; ONNX, where both factors have one dtype, would round it.
    scaled = (scaled.float() * hidden.shape[-1] ** -0.5).to(hidden.dtype)
    logits = linear(scaled, weights[f"{prefix}.proj.weight"])
    return moe_op.choose_experts(logits, weights[f"{prefix}.per_expert_scale"], top_k)


def _gated_mlp(rows: Tensor, prefix: str, weights: Tensors) -> Tensor:
    gate, up = linear(rows, weights[f"{prefix}.gate_up_proj.weight"]).chunk(2, dim=-1)
    return linear(gelu(gate, approximate="tanh") * up, weights[f"{prefix}.down_proj.weight"])
