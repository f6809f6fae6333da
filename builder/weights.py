"""The tensors that the text programs read: names as in the checkpoint, shapes from the model configuration.

Every weight but `layer_scalar` is shared by the encode and the denoise pass and exists once, under `model.decoder`.
"""

from contract.model_config import ModelConfig

EMBEDDING = "model.decoder.embed_tokens.weight"
FINAL_NORM = "model.decoder.norm.weight"
SELF_CONDITIONING = "model.decoder.self_conditioning"
# Not read by any text program.
VISION_PREFIXES = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


def layer_prefix(layer: int) -> str:
    return f"model.decoder.layers.{layer}"


def layer_scalar(layer: int, *, encoder: bool) -> str:
    """The one weight that differs between the two passes."""
    return f"model.encoder.language_model.layers.{layer}.layer_scalar" if encoder else f"{layer_prefix(layer)}.layer_scalar"


def text_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Checkpoint tensor name → shape, for every tensor of the text model."""
    hidden, width = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        FINAL_NORM: (hidden,),
        f"{SELF_CONDITIONING}.pre_norm.weight": (hidden,),
        f"{SELF_CONDITIONING}.gate_proj.weight": (width, hidden),
        f"{SELF_CONDITIONING}.up_proj.weight": (width, hidden),
        f"{SELF_CONDITIONING}.down_proj.weight": (hidden, width),
    }
    for layer, layer_type in enumerate(config.layer_types):
        attention = config.attention[layer_type]
        queries, keys = config.num_attention_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
        local: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "self_attn.q_norm.weight": (attention.head_dim,),
            "self_attn.k_norm.weight": (attention.head_dim,),
            "mlp.gate_proj.weight": (width, hidden),
            "mlp.up_proj.weight": (width, hidden),
            "mlp.down_proj.weight": (hidden, width),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "pre_feedforward_layernorm.weight": (hidden,),
            "pre_feedforward_layernorm_2.weight": (hidden,),
            "post_feedforward_layernorm.weight": (hidden,),
            "post_feedforward_layernorm_1.weight": (hidden,),
            "post_feedforward_layernorm_2.weight": (hidden,),
            "router.scale": (hidden,),
            "router.per_expert_scale": (config.num_experts,),
            "router.proj.weight": (config.num_experts, hidden),
            "experts.gate_up_proj": (config.num_experts, 2 * config.moe_intermediate_size, hidden),
            "experts.down_proj": (config.num_experts, hidden, config.moe_intermediate_size),
        }
        if attention.has_v_proj:
            local["self_attn.v_proj.weight"] = (keys, hidden)
        shapes |= {f"{layer_prefix(layer)}.{name}": shape for name, shape in local.items()}
        shapes |= {layer_scalar(layer, encoder=encoder): (1,) for encoder in (False, True)}
    return shapes
