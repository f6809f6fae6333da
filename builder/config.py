"""Reads a checkpoint's `config.json` into the resolved `ModelConfig`.

Every key is either used, known to change nothing, or refused by name: a model is never built from a half-understood file.
All problems are reported at once.
"""

import json
import os
from pathlib import Path
from typing import Any

from builder.errors import BuildError
from builder.fields import COUNT, FLAG, FRACTION, LIST, OBJECT, POSITIVE, SIZE, SOFT_TOKENS, TOKEN_ID, TOKEN_IDS, Fields
from builder.image_processor import read_soft_tokens
from builder.paths import check_path
from builder.quantization import NVFP4, NVFP4_GROUP, read_quantization
from contract.model_config import AttentionConfig, LayerType, ModelConfig, RopeConfig, VisionConfig
from contract.problems import printable
from contract.regular_file import regular

# Keys that do not change what the network computes at inference.
_INERT = frozenset(
    "_name_or_path architectures attention_dropout chunk_size_feed_forward dtype id2label initializer_range "
    "is_encoder_decoder label2id model_type output_attentions output_hidden_states problem_type return_dict torch_dtype "
    "transformers_version use_cache".split()
)
_OF_MODEL_OPTIMIZER = "hf_quant_config.json"
_LAYER_TYPES = ("sliding_attention", "full_attention")
_DEFAULT_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
_SUPPORTED_DTYPES = ("float32", "bfloat16")
_REQUIRED = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_experts top_k_experts num_hidden_layers "
    "num_attention_heads num_key_value_heads head_dim sliding_window max_position_embeddings"
).split()
_COUNTS = ("num_hidden_layers", "num_experts")


def read_model_config(checkpoint: Path) -> ModelConfig:
    """Reads and checks `checkpoint/config.json`, and what the checkpoint says of images.

    Raises:
        BuildError: the file is missing or not JSON, or one line for each key that is missing, wrong, unsupported or unknown;
            see also `read_soft_tokens`.
    """
    path = checkpoint / "config.json"
    check_path(checkpoint)
    try:
        values = json.loads(regular(path).read_text())
    except FileNotFoundError:
        if path.is_symlink():  # as Hugging Face's cache has them; a container that sees a snapshot alone sees none of its files
            raise BuildError(
                f"{path}: is a link to {os.readlink(path)}, which is not there; let it be seen here, or download it again"
            ) from None
        raise BuildError(f"{path}: no such file; expected the directory of a Hugging Face checkpoint") from None
    except OSError as error:
        got = "is a file" if os.path.isfile(checkpoint) else f"config.json cannot be read ({error.strerror})"
        raise BuildError(f"{checkpoint}: {got}; expected the directory of a Hugging Face checkpoint") from None
    except (ValueError, RecursionError) as error:  # also of a number of 5,000 digits, of lists 1,000 deep
        raise BuildError(f"{path}: not valid JSON ({error}); download the checkpoint's config.json again") from None
    if not isinstance(values, dict):
        raise BuildError(f"{path}: got a JSON {type(values).__name__}, expected an object")
    if "quantization_config" not in values and (checkpoint / _OF_MODEL_OPTIMIZER).exists():
        raise BuildError(
            f"{path}: got no quantization_config, but {_OF_MODEL_OPTIMIZER} is there; copy what it says into config.json as "
            'quantization_config, with "quant_method": "modelopt"'
        )
    problems: list[str] = []
    config = _parse(values, problems)
    if problems or config is None:
        raise BuildError("\n".join(f"{path}: {printable(problem)}" for problem in problems))
    if config.vision is None:
        return config
    soft_tokens = read_soft_tokens(checkpoint, config.vision)
    return config.model_copy(update={"vision": config.vision.model_copy(update={"soft_tokens_per_image": soft_tokens})})


def _parse(values: dict[str, Any], problems: list[str]) -> ModelConfig | None:
    model_type = values.get("model_type")
    if model_type != "diffusion_gemma" or not isinstance(values.get("text_config"), dict):
        problems.append(
            f"model_type: got {model_type!r}, expected 'diffusion_gemma' with a text_config; other families are not supported"
        )
        return None
    dtype = values.get("dtype", values.get("torch_dtype")) or values["text_config"].get("dtype")
    if dtype not in _SUPPORTED_DTYPES:
        problems.append(f"dtype: got {dtype!r}, expected one of {', '.join(_SUPPORTED_DTYPES)}")
    top = Fields(values, "", problems)
    text = Fields(top.take("text_config"), "text_config.", problems)
    vision = _vision(top, problems)
    experts_dtype = read_quantization(top.take("quantization_config"), problems)
    for each in (top, text):
        each.take_fixed("tie_word_embeddings", True, "the head is the embedding in this family")
    text.take_fixed("attention_bias", False, "projections with a bias are not supported")
    text.take_fixed("hidden_activation", "gelu_pytorch_tanh", "no other activation is supported")
    text.take_fixed("attention_k_eq_v", True, "full-attention layers take their values from k_proj in this family")

    size = {key: text.take_size(key, kind=COUNT if key in _COUNTS else SIZE) for key in _REQUIRED}
    layer_types = _layer_types(text, size["num_hidden_layers"], problems)
    attention = _attention(text, size, layer_types, problems)
    bidirectional = text.take("use_bidirectional_attention")
    if bidirectional not in (None, "vision"):
        problems.append(
            f"text_config.use_bidirectional_attention: got {bidirectional!r}, expected null or 'vision'; "
            "an encoder that is bidirectional over text is not supported"
        )
    if size["top_k_experts"] > size["num_experts"]:
        problems.append(
            f"text_config.top_k_experts: got {size['top_k_experts']}, expected at most num_experts {size['num_experts']}"
        )
    for key in ("hidden_size", "moe_intermediate_size") if experts_dtype == NVFP4 else ():
        if size[key] % NVFP4_GROUP:
            problems.append(f"text_config.{key}: got {size[key]}, expected a multiple of {NVFP4_GROUP}, the groups of NVFP4")
    ends_of_text = text.take_a(TOKEN_IDS.or_null(), "eos_token_id")
    eos = top.take_a(TOKEN_IDS.or_null(), "eos_token_id") if "eos_token_id" in top else ends_of_text
    pad = text.take_a(TOKEN_ID.or_null(), "pad_token_id", 0)
    fields = {
        **{key: size[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size")},
        **{key: size[key] for key in ("num_experts", "top_k_experts", "num_attention_heads", "max_position_embeddings")},
        "layer_types": layer_types,
        "attention": attention,
        "rms_norm_eps": text.take_a(POSITIVE, "rms_norm_eps", 1e-6),
        "final_logit_softcapping": text.take_a(POSITIVE.or_null(), "final_logit_softcapping", 30.0),
        "canvas_length": top.take_size("canvas_length", 256),
        "bidirectional_images": bidirectional == "vision",
        "bos_token_id": text.take_a(TOKEN_ID.or_null(), "bos_token_id", 2),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "pad_token_id": 0 if pad is None else pad,
        "image_token_id": top.take_a(TOKEN_ID.or_null(), "image_token_id", 258_880),
        "boi_token_id": top.take_a(TOKEN_ID.or_null(), "boi_token_id", 255_999),
        "eoi_token_id": top.take_a(TOKEN_ID.or_null(), "eoi_token_id", 258_882),
        "vision": vision,
        "dtype": dtype,
        "experts_dtype": experts_dtype,
    }
    for key in ("image_token_id", "boi_token_id", "eoi_token_id") if vision else ():
        if fields[key] is None:
            problems.append(f"{key}: got null, expected a token id, or vision_config null for a model that reads text alone")
    top.finish(_INERT)
    text.finish(_INERT)
    return None if problems else ModelConfig(**fields)


def _layer_types(text: Fields, num_layers: int, problems: list[str]) -> tuple[LayerType, ...]:
    layer_types = text.take_a(LIST.or_null(), "layer_types")
    if layer_types is None:  # the family's default: five sliding layers, then a full one
        layer_types = ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(num_layers)]
        layer_types[-1] = "full_attention"
    for unknown in sorted({str(each) for each in layer_types} - set(_LAYER_TYPES)):
        problems.append(f"text_config.layer_types: got {unknown!r}, expected one of {', '.join(_LAYER_TYPES)}")
    if len(layer_types) != num_layers:
        problems.append(f"text_config.layer_types: got {len(layer_types)} layers, expected num_hidden_layers {num_layers}")
    if layer_types and layer_types[-1] != "full_attention":
        problems.append(f"text_config.layer_types: last layer is {layer_types[-1]!r}, expected 'full_attention'")
    return tuple(each for each in layer_types if each in _LAYER_TYPES)


def _attention(
    text: Fields, size: dict[str, int], layer_types: tuple[LayerType, ...], problems: list[str]
) -> dict[LayerType, AttentionConfig]:
    """Sliding layers use head_dim and num_key_value_heads; full layers their global_* twins or `per_layer_config`."""
    full = {
        "head_dim": text.take_size("global_head_dim", 512),
        "num_key_value_heads": size["num_key_value_heads"],
    }
    if (num_kv_heads := text.take_a(SIZE.or_null(), "num_global_key_value_heads")) is not None:
        full["num_key_value_heads"] = num_kv_heads
    if "per_layer_config" in text:  # transformers then disregards the global_* twins
        full = {key: size[key] for key in full} | _overrides(
            text.take_a(OBJECT.or_null(), "per_layer_config") or {}, layer_types, problems
        )
    rope_parameters = text.take_a(OBJECT.or_null(), "rope_parameters") or _DEFAULT_ROPE
    result: dict[LayerType, AttentionConfig] = {}
    for kind in sorted(set(layer_types)):
        sliding = kind == "sliding_attention"
        head_dim = size["head_dim"] if sliding else full["head_dim"]
        num_kv_heads = size["num_key_value_heads"] if sliding else full["num_key_value_heads"]
        if size["num_attention_heads"] % num_kv_heads:
            problems.append(
                f"{kind}: num_attention_heads {size['num_attention_heads']} is not a multiple of {num_kv_heads} key/value heads"
            )
        if head_dim % 2:
            problems.append(f"{kind}: got head_dim {head_dim}, expected an even number, whose halves are rotated")
        result[kind] = AttentionConfig(
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            window=size["sliding_window"] if sliding else 0,
            has_v_proj=sliding,
            rope=_rope(rope_parameters.get(kind), kind, head_dim, problems),
        )
    if size["sliding_window"] < 2:
        problems.append(f"text_config.sliding_window: got {size['sliding_window']}, expected at least 2")
    return result


def _overrides(per_layer: dict[str, Any], layer_types: tuple[LayerType, ...], problems: list[str]) -> dict[str, int]:
    """What full-attention layers have instead of the sliding layers' sizes: nothing, where `per_layer` is empty."""
    if not per_layer:
        return {}
    first, *others = per_layer.values()
    known = isinstance(first, dict) and set(first) <= {"head_dim", "num_key_value_heads"}
    full = {str(layer) for layer, kind in enumerate(layer_types) if kind == "full_attention"}
    if known and all(map(SIZE.holds, first.values())) and set(per_layer) == full and all(other == first for other in others):
        return first
    problems.append(
        "text_config.per_layer_config: expected the same head_dim and num_key_value_heads for every full-attention layer "
        "and no other override"
    )
    return {}


def _rope(parameters: dict[str, Any] | None, kind: str, head_dim: int, problems: list[str]) -> RopeConfig:
    where = f"text_config.rope_parameters.{kind}."
    if not isinstance(parameters, dict):
        problems.append(f"{where}: missing; expected rope_type and rope_theta")
        return RopeConfig(theta=1.0, num_angles=0)
    fields = Fields(parameters, where, problems)
    rope_type = fields.take("rope_type", "default")
    if "rope_theta" not in fields:
        problems.append(f"{where}rope_theta: got nothing, expected {POSITIVE.expected}")
    theta = fields.take_a(POSITIVE, "rope_theta", 1.0)
    part = fields.take_a(FRACTION, "partial_rotary_factor", 1.0)
    if rope_type not in ("default", "proportional"):
        problems.append(f"{where}rope_type: got {rope_type!r}, expected 'default' or 'proportional'")
    elif rope_type == "default" and part != 1.0:
        problems.append(f"{where}partial_rotary_factor: got {part}, expected 1.0 with rope_type 'default'")
    if rope_type in ("default", "proportional"):
        fields.take_fixed("factor", 1.0, "scaled positions are not supported")
        fields.finish(_INERT)
    return RopeConfig(theta=float(theta), num_angles=int(part * head_dim // 2))


def _vision(top: Fields, problems: list[str]) -> VisionConfig | None:
    """Defaults are those of transformers' `Gemma4VisionConfig`."""
    values = top.take_a(OBJECT.or_null(), "vision_config")
    if values is None:
        top.take("vision_soft_tokens_per_image")
        return None
    soft_tokens = top.take_a(SOFT_TOKENS, "vision_soft_tokens_per_image", 280)
    fields = Fields(values, "vision_config.", problems)
    fields.take_fixed("model_type", "gemma4_vision", "no other vision tower is supported")
    fields.take_fixed("attention_bias", False, "projections with a bias are not supported")
    fields.take_fixed("hidden_activation", "gelu_pytorch_tanh", "no other activation is supported")
    fields.take("max_position_embeddings")  # of no use: positions are those of position_embedding_size
    rope = Fields(fields.take_a(OBJECT.or_null(), "rope_parameters") or {}, "vision_config.rope_parameters.", problems)
    rope.take_fixed("rope_type", "axial", "no other rotation is supported")
    theta = rope.take_a(POSITIVE, "rope_theta", 100.0)
    rope.finish(_INERT)
    config = VisionConfig(
        hidden_size=fields.take_size("hidden_size", 768),
        intermediate_size=fields.take_size("intermediate_size", 3072),
        num_layers=fields.take_size("num_hidden_layers", 16, COUNT),
        num_attention_heads=fields.take_size("num_attention_heads", 12),
        num_kv_heads=fields.take_size("num_key_value_heads", 12),
        head_dim=fields.take_size("head_dim", 64),
        patch_size=fields.take_size("patch_size", 16),
        pooling_kernel_size=fields.take_size("pooling_kernel_size", 3),
        position_embedding_size=fields.take_size("position_embedding_size", 10_240),
        rope_theta=float(theta),
        rms_norm_eps=fields.take_a(POSITIVE, "rms_norm_eps", 1e-6),
        standardize=fields.take_a(FLAG, "standardize", False),
        clipped=fields.take_a(FLAG, "use_clipped_linears", False),
        soft_tokens_per_image=soft_tokens,
    )
    fields.finish(_INERT)
    if config.num_attention_heads % config.num_kv_heads:
        problems.append(
            f"vision_config: num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"{config.num_kv_heads} key/value heads"
        )
    if config.head_dim % 4:
        problems.append(f"vision_config.head_dim: got {config.head_dim}, expected a multiple of 4, to rotate by x and by y")
    return config
