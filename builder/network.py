"""The network in plain PyTorch: four programs over (activations, weights).

Shape legend: T packed tokens, B sequences, C canvas_length, D hidden_size, V vocabulary, H query heads, K key/value heads,
P page-table columns, R rows. Activations are in the engine's dtype; norms, softmaxes and rotations compute in float32 where
transformers' `modeling_diffusion_gemma.py` does, and round where it rounds.

| program | activations | result |
|---|---|---|
| encode | token_ids [T], positions [T], sequence_starts [B + 1], prefix_lengths [B], page tables, image inputs, KV pages | new keys and values of every layer, [T, 2, K, head_dim] each |
| denoise | canvas_ids [B, C], soft_embeds [B, C, D], prefix_lengths [B], page tables, KV pages | final-norm hidden states [B, C, D] |
| mixed | those of denoise; token_ids [C], positions [C] and starts [2] of new tokens, what their sequence has before them and where they go | as denoise; it writes the new tokens' keys and values into their pages |
| head | hidden [R, D] | raw logits [R, V] |
"""  # noqa: E501

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from builder.quantization import FP8
from builder.weights import EMBEDDING, FINAL_NORM, SELF_CONDITIONING, layer_prefix, of_gpu
from contract.model_config import LayerType, ModelConfig
from plugins import attention_op, feed_forward_op, heads_op, mixed_op, spread_op
from plugins.batch_invariance import num_splits
from plugins.feed_forward.reference import gated_mlp
from plugins.rms_norm import rms_norm

Tensors = Mapping[str, Tensor]
OfLayer = Callable[[str], Tensor]

_FEED_FORWARD_NORMS = (
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_1",
    "post_feedforward_layernorm_2",
    "post_feedforward_layernorm",
)
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
_FP8_EXPERTS = ("experts.gate_up_proj", "experts.gate_up_proj_scale", "experts.down_proj", "experts.down_proj_scale")


class Encode(nn.Module):
    """The causal pass over a prompt's chunk or a finished canvas. There is no head: only keys and values come out."""

    def __init__(self, config: ModelConfig, **choices):
        """choices: see `_Stack`."""
        super().__init__()
        self.stack = _Stack(config, encoder=True, **choices)

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

    def __init__(self, config: ModelConfig, **choices):
        """choices: see `_Stack`."""
        super().__init__()
        self.stack = _Stack(config, encoder=False, **choices)
        self.eps = config.rms_norm_eps

    def forward(self, inputs: Tensors, weights: Tensors) -> Tensor:
        hidden, positions, starts = self.canvases(inputs, weights)
        normed, _ = self.stack(hidden, positions, starts, torch.full_like(positions, -1), inputs, weights)
        return normed.view(*inputs["canvas_ids"].shape, -1)

    def canvases(self, inputs: Tensors, weights: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """What the layers are given of the canvases: rows [B * C, D], their positions [B * C], starts [B + 1]."""
        canvas_ids = inputs["canvas_ids"]
        batch, length = canvas_ids.shape
        hidden = self.stack.embed(canvas_ids.flatten(), weights)
        hidden = self._self_condition(hidden, inputs["soft_embeds"].flatten(0, 1), weights)
        within = torch.arange(length, dtype=torch.int32, device=canvas_ids.device)
        positions = (inputs["prefix_lengths"].unsqueeze(1) + within).flatten()
        return hidden, positions, torch.arange(batch + 1, dtype=torch.int32, device=canvas_ids.device) * length

    def _self_condition(self, hidden: Tensor, soft_embeds: Tensor, weights: Tensors) -> Tensor:
        """Adds the gated MLP of the previous step's soft embeddings; zeros in, zeros added."""
        normed = rms_norm(soft_embeds, weights[f"{SELF_CONDITIONING}.pre_norm.weight"], self.eps)
        made = gated_mlp(normed, *(weights[f"{SELF_CONDITIONING}.{name}.weight"] for name in ("gate_up_proj", "down_proj")))
        return rms_norm(hidden + made, None, self.eps)


class Mixed(Denoise):
    """Denoise, and encode of new tokens of one sequence, in one pass over the weights. If one of the canvases is the sequence's
    next, it sees them."""

    def __init__(self, config: ModelConfig, **choices):
        super().__init__(config, **choices)
        self.stack = _MixedStack(config, encoder=False, **choices)

    def forward(self, inputs: Tensors, weights: Tensors) -> Tensor:
        hidden, positions, starts = self.canvases(inputs, weights)
        hidden = torch.cat([self.stack.embed(inputs["token_ids"], weights), hidden])
        positions = torch.cat([inputs["positions"], positions])
        normed, _ = self.stack(hidden, positions, starts, torch.full_like(positions, -1), inputs, weights)
        num_new, num_rows = inputs["token_ids"].shape[0], inputs["canvas_ids"].numel()
        return normed.narrow(0, num_new, num_rows).view(*inputs["canvas_ids"].shape, -1)


class Head(nn.Module):
    """Rows of hidden states → raw logits over the vocabulary, in the engine's dtype, not yet soft-capped."""

    def forward(self, inputs: Tensors, weights: Tensors) -> Tensor:
        return linear(inputs["hidden"], weights[EMBEDDING])


class _Stack(nn.Module):
    """The layers, shared by encode (causal) and denoise."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        encoder: bool,
        fp8_rows: bool = False,
        batch_invariant: bool = False,
        expert_gpus: int = 1,
    ):
        """The last three as in `contract.manifest.BuildConfig`; fp8_rows: expert_activations are FP8."""
        super().__init__()
        self.config, self.encoder, self.fp8_rows, self.batch_invariant = config, encoder, fp8_rows, batch_invariant
        self.expert_gpus = expert_gpus
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
        """Returns final-normed hidden states [T, D], which an encode pass does without: there it is anything; and each layer's
        new keys and values [T, 2, K, head_dim]."""
        rotations = {
            layer_type: rotation(positions, getattr(self, f"{layer_type}_frequencies"), hidden.dtype)
            for layer_type in self.config.attention
        }
        layers = [self._of_layer(layer, weights) for layer in range(self.config.num_layers)]
        scalars = self._scalars(hidden, weights)
        new_kv, normed = [], rms_norm(hidden, layers[0]("input_layernorm.weight"), self.config.rms_norm_eps)
        for layer, (layer_type, own) in enumerate(zip(self.config.layer_types, layers, strict=True)):
            query, kv = self._project(normed, layer_type, rotations[layer_type], own)
            new_kv.append(kv)
            if len(new_kv) == self.config.num_layers and self.encoder:
                break  # what follows, nobody reads
            seen = [
                query,
                kv,
                inputs[f"kv_pages.{layer}"],
                inputs[f"{layer_type}.page_table"],
                inputs["prefix_lengths"],
                starts,
                image_blocks,
            ]
            attended = self._attend(layer_type, seen, inputs)
            attended = linear(attended.flatten(1), own("self_attn.o_proj.weight"))
            is_last = layer + 1 == self.config.num_layers
            following = weights[FINAL_NORM] if is_last else layers[layer + 1]("input_layernorm.weight")
            hidden, normed = self._feed_forward(hidden, attended, scalars[layer], own, following)
        return normed, new_kv

    def _of_layer(self, layer: int, weights: Tensors) -> OfLayer:
        """The weights of one layer by the names that they have within it."""
        own, shared = layer_prefix(layer, encoder=self.encoder), layer_prefix(layer)
        return lambda name: weights[f"{own}.{name}" if f"{own}.{name}" in weights else f"{shared}.{name}"]

    def _scalars(self, hidden: Tensor, weights: Tensors) -> Sequence[Tensor]:
        """By layer its scalar: [1], or that of each row."""
        return [weights[f"{layer_prefix(layer, encoder=self.encoder)}.layer_scalar"] for layer in range(self.config.num_layers)]

    def _attend(self, layer_type: LayerType, seen: Sequence[Tensor], inputs: Tensors) -> Tensor:
        """seen: what `paged_attention` is given; inputs: the program's."""
        window = self.config.attention[layer_type].window
        if not self.batch_invariant:
            return attention_op.paged_attention(*seen, self.encoder, window)
        splits = num_splits(window=window, encoder=self.encoder)
        return attention_op.paged_attention_in_splits(*seen, self.encoder, window, splits)

    def _feed_forward(
        self, hidden: Tensor, attended: Tensor, scalar: Tensor, own: OfLayer, following: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The layer's output, and what the next norm, whose weight is `following`, makes of it."""

        def each(*names: str) -> list[Tensor]:
            return [own(name) for name in names]

        experts = _FP8_EXPERTS if self.config.experts_dtype == FP8 else _EXPERTS
        given = (
            hidden,
            attended,
            [*each(*(f"{name}.weight" for name in _FEED_FORWARD_NORMS)), following],
            scalar,
            each("mlp.gate_up_proj.weight", "mlp.down_proj.weight"),
            each("router.scale", "router.proj.weight", "router.per_expert_scale"),
            each(*(of_gpu(name, gpu) for gpu in range(self.expert_gpus) for name in experts)),
        )
        choices = (self.config.top_k_experts, self.config.rms_norm_eps, self.fp8_rows)
        if self.expert_gpus > 1:
            return spread_op.feed_forward_spread(*given, self.expert_gpus, *choices)
        return feed_forward_op.feed_forward(*given, *choices)

    def _project(
        self, rows: Tensor, layer_type: LayerType, rotated_by: tuple[Tensor, Tensor], own: OfLayer
    ) -> tuple[Tensor, Tensor]:
        """Normed, rotated queries [T, H, head_dim] and keys with values [T, 2, K, head_dim]."""
        attention, eps = self.config.attention[layer_type], self.config.rms_norm_eps
        heads = linear(rows, own("self_attn.qkv_proj.weight"))
        norms = (own(f"self_attn.{name}.weight") for name in ("q_norm", "k_norm"))
        # Full-attention layers have no v_proj: the value is the key before its norm and rotation.
        return heads_op.normed_heads(heads, *norms, *rotated_by, attention.num_kv_heads, attention.has_v_proj, eps)


class _MixedStack(_Stack):
    """The layers over new tokens of one sequence, as many as a canvas has, and canvases behind them."""

    def _scalars(self, hidden: Tensor, weights: Tensors) -> Sequence[Tensor]:
        num_new, layers = self.config.canvas_length, range(self.config.num_layers)
        of_rows = [
            torch.cat([weights[f"{layer_prefix(layer, encoder=encoder)}.layer_scalar"] for layer in layers])
            .unsqueeze(1)
            .expand(-1, count)
            for encoder, count in ((True, num_new), (False, hidden.shape[0] - num_new))
        ]
        return torch.cat(of_rows, dim=1).unbind()

    def _attend(self, layer_type: LayerType, seen: Sequence[Tensor], inputs: Tensors) -> Tensor:
        own = (f"{layer_type}.page_table", "prefix_lengths", "starts", f"{layer_type}.rows", f"{layer_type}.cells")
        new = (inputs[f"new.{name}"] for name in own)
        return mixed_op.mixed_attention(*seen, *new, self.config.attention[layer_type].window)


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
