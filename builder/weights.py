"""The tensors that the programs read: names as in the checkpoint, shapes from the model configuration; and the weight bindings
made of them.

The encode and the denoise pass share the text weights, which exist once, under `model.decoder`; but each layer's `layer_scalar`
exists twice, and so may others of a layer: where a checkpoint has one for the encoder, too, the encode pass reads that.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from builder.quantization import FP8, NVFP4
from contract.manifest import Arrangement, BuildConfig, Part
from contract.model_config import ModelConfig
from plugins.moe.arranging import HALVES
from plugins.moe.formats import Format, dtype_in_format, shape_in_format
from plugins.moe.nvfp4 import NVFP4_DTYPE, num_columns, row_bytes

Shapes = Mapping[str, tuple[int, ...]]

EMBEDDING = "model.decoder.embed_tokens.weight"
FINAL_NORM = "model.decoder.norm.weight"
SELF_CONDITIONING = "model.decoder.self_conditioning"
DECODER_LAYERS, ENCODER_LAYERS = "model.decoder.layers.", "model.encoder.language_model.layers."
VISION_TOWER = "model.encoder.vision_tower"
VISION_PROJECTION = "model.encoder.embed_vision.embedding_projection.weight"
VISION_PREFIXES = (f"{VISION_TOWER}.", "model.encoder.embed_vision.")
CAST_FROM = ("float32", "bfloat16", "float16")
"""Dtypes of tensors that the load casts to the engine's."""
CLIPPING = ("input_min", "input_max", "output_min", "output_max")
"""Scalars of a linear layer that clamps what goes in and what comes out."""


def layer_prefix(layer: int, *, encoder: bool = False) -> str:
    return f"{ENCODER_LAYERS if encoder else DECODER_LAYERS}{layer}"


def of_decoder(name: str) -> str:
    """The name that the decoder has for a tensor of the encoder's layers."""
    return DECODER_LAYERS + name.removeprefix(ENCODER_LAYERS)


def with_encoder_weights(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """With those of a checkpoint's tensors that are the encoder's own. transformers then does not tie them to the decoder's."""
    shared = text_weights(config.model_copy(update={"encoder_weights": ()}))
    own = [name for name in names if name.startswith(ENCODER_LAYERS) and of_decoder(name) in shared and name not in shared]
    return config.model_copy(update={"encoder_weights": tuple(sorted(own))})


def all_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Checkpoint tensor name → shape, for every tensor of the model."""
    return text_weights(config) | vision_weights(config)


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
            "experts.gate_up_proj": (config.num_experts, 2 * config.moe_intermediate_size, _stored_columns(hidden, config)),
            "experts.down_proj": (config.num_experts, hidden, _stored_columns(config.moe_intermediate_size, config)),
        }
        if config.experts_dtype == FP8:
            local["experts.gate_up_proj_scale"] = (config.num_experts, 2 * config.moe_intermediate_size)
            local["experts.down_proj_scale"] = (config.num_experts, hidden)
        if attention.has_v_proj:
            local["self_attn.v_proj.weight"] = (keys, hidden)
        shapes |= {f"{layer_prefix(layer)}.{name}": shape for name, shape in local.items()}
        shapes |= {f"{layer_prefix(layer, encoder=encoder)}.layer_scalar": (1,) for encoder in (False, True)}
    return shapes | {name: shapes[of_decoder(name)] for name in config.encoder_weights}


def _stored_columns(columns: int, config: ModelConfig) -> int:
    """Of a tensor with experts' weights."""
    return row_bytes(columns) if config.experts_dtype == NVFP4 else columns


def vision_layer_prefix(layer: int) -> str:
    return f"{VISION_TOWER}.encoder.layers.{layer}"


def vision_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """As `text_weights`, for the vision tower and its projection; nothing where the model has none."""
    vision = config.vision
    if vision is None:
        return {}
    hidden, width = vision.hidden_size, vision.intermediate_size
    queries, keys = vision.num_attention_heads * vision.head_dim, vision.num_kv_heads * vision.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        f"{VISION_TOWER}.patch_embedder.input_proj.weight": (hidden, 3 * vision.patch_size**2),
        f"{VISION_TOWER}.patch_embedder.position_embedding_table": (2, vision.position_embedding_size, hidden),
        VISION_PROJECTION: (config.hidden_size, hidden),
    }
    if vision.standardize:
        shapes |= {f"{VISION_TOWER}.{name}": (hidden,) for name in ("std_bias", "std_scale")}
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    for layer in range(vision.num_layers):
        prefix = vision_layer_prefix(layer)
        shapes |= {f"{prefix}.{name}.linear.weight": shape for name, shape in linears.items()}
        shapes |= {f"{prefix}.self_attn.{name}.weight": (vision.head_dim,) for name in ("q_norm", "k_norm")}
        shapes |= {f"{prefix}.{name}.weight": (hidden,) for name in norms}
        if vision.clipped:
            shapes |= {f"{prefix}.{name}.{bound}": () for name in linears for bound in CLIPPING}
    return shapes


_EXPERTS = ".experts."
_GATE_UP, _DOWN = f"{_EXPERTS}gate_up_proj", f"{_EXPERTS}down_proj"
_STACKS = {
    "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "gate_up_proj.weight": ("gate_proj.weight", "up_proj.weight"),
}


def bindings(shapes: Shapes) -> dict[str, tuple[str, ...]]:
    """Weight binding → the checkpoint tensors that it is made of, one after the other along the first axis.

    Linear layers that read the same rows are bound as one weight, and are one product: with few rows each product alone is
    too small for a GPU. The encoder's, where one of them is its own, takes the others from the decoder.
    """
    bound = {}
    for name in shapes:
        for stack, parts in _STACKS.items():
            own = next((part for part in parts if name.endswith(f".{part}")), None)
            if own:
                prefix = name.removesuffix(own)
                of_stack = [prefix + part if prefix + part in shapes else of_decoder(prefix + part) for part in parts]
                bound[prefix + stack] = tuple(part for part in of_stack if part in shapes)
                break
        else:
            bound[name] = (name,)
    return bound


def binding_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Weight binding → shape."""
    bound = {}
    for binding, (first, *others) in bindings(shapes).items():
        bound[binding] = shapes[first]
        for other in others:
            bound[binding] = (bound[binding][0] + shapes[other][0], *shapes[first][1:])
    return bound


def of_pass(names: Iterable[str], *, encoder: bool) -> tuple[str, ...]:
    """The weight bindings of the text model that the encode pass reads, or the denoise pass."""
    own = {of_decoder(name): name for name in names if name.startswith(ENCODER_LAYERS)}
    shared = [name for name in names if not name.startswith(ENCODER_LAYERS)]
    if not encoder:
        return tuple(shared)
    return tuple(own.get(name, name) for name in shared if name != FINAL_NORM and not name.startswith(SELF_CONDITIONING))


def is_of_experts(name: str) -> bool:
    """Whether a binding is the experts' projection of a layer: what is in FP8 where a checkpoint has it, and may be stored in
    fewer bits."""
    return name.endswith((_GATE_UP, _DOWN))


def weight_dtype(name: str, config: ModelConfig, dtype: str) -> str:
    """The dtype of a weight that no arrangement changes; `dtype` is the engine's, in which all but quantized experts are."""
    if config.experts_dtype and is_of_experts(name):
        return NVFP4_DTYPE if config.experts_dtype == NVFP4 else config.experts_dtype
    return "float32" if name.endswith((f"{_GATE_UP}_scale", f"{_DOWN}_scale")) else dtype


class Bound(NamedTuple):
    """A weight as the programs are called with it, and the checkpoint's tensors that it is made of."""

    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    arrangement: Arrangement | None = None
    part: Part | None = None


def bound_weights(shapes: Shapes, config: ModelConfig, build: BuildConfig) -> dict[str, Bound]:
    """Weight binding → what the programs get. `shapes`: of the checkpoint's tensors."""
    bound: dict[str, Bound] = {}
    made_of = bindings(shapes)
    for name, shape in binding_shapes(shapes).items():
        if build.expert_gpus == 1 or _EXPERTS not in name:
            bound[name] = _bound(name, made_of[name], shape, config, build)
            continue
        for gpu in range(build.expert_gpus):
            part = Part(number=gpu, of=build.expert_gpus)
            its_shape = (shape[0] // part.of, *shape[1:])
            bound[of_gpu(name, gpu)] = _bound(name, made_of[name], its_shape, config, build)._replace(part=part)
    return bound


def _bound(name: str, tensors: tuple[str, ...], shape: tuple[int, ...], config: ModelConfig, build: BuildConfig) -> Bound:
    wanted = experts_format(config, build)
    if not (wanted and is_of_experts(name)):
        return Bound(tensors, shape, weight_dtype(name, config, build.dtype))
    arrangement = Arrangement(format=wanted, halves=HALVES[name.rpartition(".")[2]])
    shape = (*shape[:2], num_columns(shape[2])) if wanted == "nvfp4" else shape
    return Bound(tensors, shape_in_format(shape, wanted, arrangement.halves), dtype_in_format(wanted), arrangement)


def of_gpu(name: str, gpu: int) -> str:
    """The binding of the experts that a GPU has, by number."""
    return f"{name}.{gpu}" if gpu else name


def experts_format(config: ModelConfig, build: BuildConfig) -> Format | None:
    """The format of the experts' weights; None: as the checkpoint has them, which is how a CPU takes those in FP8."""
    if config.experts_dtype == NVFP4:
        return "nvfp4"
    if build.expert_weights != "plain":
        return build.expert_weights
    if config.experts_dtype and build.device == "cuda":
        return "narrow" if build.expert_activations == "float8" else "wide"
    return None
