"""The vision network in plain PyTorch, a pure program over (activations, weights) like those of `builder.network`.

Shape legend: S soft tokens, K pooling_kernel_size, N = S K² patches, P patch_size, D the tower's hidden_size, H query heads.

| activation | shape, dtype | meaning |
|---|---|---|
| patches | [S, K², 3 P²], the engine's | pixels from -1 to 1, the K² patches of a soft token together |
| patch_positions | [S, K², 2] int32 | (x, y) of each patch |
| patch_range | [2] int32 | 0 and the number of patches, from where on rows are filler: it is computed and means nothing |

Result: image_embeds [S, hidden_size of the text], in the engine's dtype.

Source: transformers' `modeling_gemma4.py`, whose roundings it shares. There patches are padded and masked, and pooled through a
matrix of who belongs to whom; here filler is behind the last sequence of the attention operator, and pooling is a mean.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, pad

from builder.network import Tensors, rotation
from builder.weights import CLIPPING, VISION_PROJECTION, VISION_TOWER, vision_layer_prefix
from contract.model_config import ModelConfig, VisionConfig
from plugins import attention_op
from plugins.heads.reference import rotate
from plugins.rms_norm import rms_norm

_LEAST_HEAD_DIM = 16


class Vision(nn.Module):
    """Patches of one image → the embeddings that stand in for its tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config: VisionConfig = config.vision
        self.register_buffer("frequencies", axial_frequencies(self.config), persistent=False)

    def forward(self, inputs: Tensors, weights: Tensors) -> Tensor:
        """
        1. Embed the patches, and add their places in x and in y. 2. The layers. 3. Average each soft token's patches, scale,
        standardize: in float32. 4. Project into the text's embeddings.
        """
        config = self.config
        x, y = inputs["patch_positions"].flatten(0, 1).unbind(1)
        # 1.
        hidden = linear(inputs["patches"].flatten(0, 1), weights[f"{VISION_TOWER}.patch_embedder.input_proj.weight"])
        of_x, of_y = weights[f"{VISION_TOWER}.patch_embedder.position_embedding_table"].unbind(0)
        hidden = hidden + (of_x.index_select(0, x.long()) + of_y.index_select(0, y.long()))
        # 2.
        rotations = [rotation(each, self.frequencies, hidden.dtype) for each in (x, y)]
        none_cached = inputs["patch_range"].narrow(0, 0, 1)  # 0
        sequence = (none_cached.unsqueeze(1), none_cached, inputs["patch_range"], torch.full_like(x, -1))
        for layer in range(config.num_layers):
            hidden = self._layer(hidden, vision_layer_prefix(layer), rotations, sequence, weights)
        # 3.
        pooled = hidden.unflatten(0, (-1, config.pooling_kernel_size**2)).float().mean(1).to(hidden.dtype)
        soft = pooled.float() * config.hidden_size**0.5
        if config.standardize:
            bias, scale = (weights[f"{VISION_TOWER}.{name}"].float() for name in ("std_bias", "std_scale"))
            soft = (soft - bias) * scale
        # 4.
        return linear(rms_norm(soft.to(hidden.dtype), None, config.rms_norm_eps), weights[VISION_PROJECTION])

    def _layer(self, hidden: Tensor, prefix: str, rotations: list, sequence: tuple, weights: Tensors) -> Tensor:
        def normed(rows: Tensor, name: str) -> Tensor:
            return rms_norm(rows, weights[f"{prefix}.{name}.weight"], self.config.rms_norm_eps)

        rows = normed(hidden, "input_layernorm")
        heads = [
            self._linear(rows, f"{prefix}.self_attn.{name}", weights).unflatten(1, (-1, self.config.head_dim))
            for name in ("q_proj", "k_proj", "v_proj")
        ]
        query, key = (
            rotate_both(normed(each, f"self_attn.{name}"), rotations)
            for each, name in zip(heads[:2], ("q_norm", "k_norm"), strict=True)
        )
        attended = attend_all(query, key, rms_norm(heads[2], None, self.config.rms_norm_eps), sequence)
        attended = self._linear(attended.flatten(1), f"{prefix}.self_attn.o_proj", weights)
        hidden = hidden + normed(attended, "post_attention_layernorm")
        rows = normed(hidden, "pre_feedforward_layernorm")
        gate = gelu(self._linear(rows, f"{prefix}.mlp.gate_proj", weights), approximate="tanh")
        rows = gate * self._linear(rows, f"{prefix}.mlp.up_proj", weights)
        return hidden + normed(self._linear(rows, f"{prefix}.mlp.down_proj", weights), "post_feedforward_layernorm")

    def _linear(self, rows: Tensor, name: str, weights: Tensors) -> Tensor:
        if not self.config.clipped:
            return linear(rows, weights[f"{name}.linear.weight"])
        low, high, lowest, highest = (weights[f"{name}.{bound}"] for bound in CLIPPING)
        rows = linear(torch.minimum(torch.maximum(rows, low), high), weights[f"{name}.linear.weight"])
        return torch.minimum(torch.maximum(rows, lowest), highest)


def axial_frequencies(config: VisionConfig) -> Tensor:
    """[head_dim / 4] float32: theta ** (-2 i / (head_dim / 2)); half of a head turns by x, the other by y."""
    half = config.head_dim // 2
    return 1.0 / (config.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half))


def rotate_both(heads: Tensor, rotations: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The first half of each head by x, the second by y: [N, heads, head_dim]."""
    return torch.cat([rotate(half, *by) for half, by in zip(heads.chunk(2, dim=-1), rotations, strict=True)], dim=-1)


def attend_all(query: Tensor, key: Tensor, value: Tensor, sequence: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Every patch over all of the image, by the attention operator: a canvas with nothing cached before it.

    sequence: the operator's page_table, prefix_lengths, sequence_starts and image_block_ids. Its kernels take heads of a power
    of two: zeros that fill them up change neither scores nor values.
    """
    head_dim = query.shape[-1]
    width = max(_LEAST_HEAD_DIM, 1 << (head_dim - 1).bit_length())
    query, key, value = (pad(each, (0, width - head_dim)) for each in (query, key, value))
    new_kv = torch.stack([key, value], dim=1)
    no_pages = new_kv.unsqueeze(1)  # never read: pages of one token
    return attention_op.paged_attention(query, new_kv, no_pages, *sequence, False, 0).narrow(2, 0, head_dim)
