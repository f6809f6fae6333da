"""The resolved model: every fact about a checkpoint that shapes a program or the runtime, nothing left to default."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen, strict record: unknown keys raise, so that a file from another version is never half understood."""

    model_config = ConfigDict(frozen=True, extra="forbid")


ExpertsDtype = Literal["float8_e4m3fn", "nvfp4"]
LayerType = Literal["sliding_attention", "full_attention"]


class RopeConfig(Record):
    """Rotary embedding of one layer type: `num_angles` of the head's head_dim / 2 angle pairs turn, the rest stay.

    Frequency i is theta ** (-2 i / head_dim): the denominator is the whole head_dim also where only a part turns.
    """

    theta: float
    num_angles: int


class AttentionConfig(Record):
    """One layer type's attention. `window` 0 means no window; else a token sees itself and window - 1 tokens before."""

    num_kv_heads: int
    head_dim: int
    window: int
    has_v_proj: bool
    rope: RopeConfig


SOFT_TOKEN_BUDGETS = (70, 140, 280, 560, 1120)
"""What an image may come to: the budgets that the family was trained with."""


class VisionConfig(Record):
    """The vision tower: patches of patch_size² pixels, their positions from a table of position_embedding_size a side, layers,
    and pooling_kernel_size² patches averaged into one soft token.

    standardize: the soft tokens are shifted and scaled after pooling. clipped: linear layers clamp what goes in and out.
    soft_tokens_per_image: at most, where a request does not say. Source: transformers' `Gemma4VisionConfig`.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    patch_size: int
    pooling_kernel_size: int
    position_embedding_size: int
    rope_theta: float
    rms_norm_eps: float
    standardize: bool
    clipped: bool
    soft_tokens_per_image: int


class ModelConfig(Record):
    """Sizes and constants of one checkpoint of the family; vision is None where it reads text alone. experts_dtype: of the
    experts' weights, where it is not the dtype of the others.

    Source of the meanings: transformers' `DiffusionGemmaTextConfig` and `DiffusionGemmaConfig`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k_experts: int
    num_attention_heads: int
    layer_types: tuple[LayerType, ...]
    attention: dict[LayerType, AttentionConfig]
    rms_norm_eps: float
    final_logit_softcapping: float | None
    max_position_embeddings: int
    canvas_length: int
    bidirectional_images: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    image_token_id: int | None
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    vision: VisionConfig | None = None
    dtype: str
    experts_dtype: ExpertsDtype | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)
