"""The resolved model: every fact about a checkpoint that shapes a program or the runtime, nothing left to default."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

INT32_MAX = 2**31 - 1
Size = Annotated[int, Field(ge=1, le=INT32_MAX)]
TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]


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

    num_kv_heads: Size
    head_dim: Size
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

    hidden_size: Size
    intermediate_size: Size
    num_layers: Size
    num_attention_heads: Size
    num_kv_heads: Size
    head_dim: Size
    patch_size: Size
    pooling_kernel_size: Size
    position_embedding_size: Size
    rope_theta: float
    rms_norm_eps: float
    standardize: bool
    clipped: bool
    soft_tokens_per_image: Size


class ModelConfig(Record):
    """Sizes and constants of one checkpoint of the family; vision is None where it reads text alone. experts_dtype: of the
    experts' weights, where it is not the dtype of the others. encoder_weights: tensors of layers that the encode pass has for
    itself, besides the scalars; else it shares those of the denoising pass.

    Source of the meanings: transformers' `DiffusionGemmaTextConfig` and `DiffusionGemmaConfig`.
    """

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    moe_intermediate_size: Size
    num_experts: Size
    top_k_experts: Size
    num_attention_heads: Size
    layer_types: tuple[LayerType, ...]
    attention: dict[LayerType, AttentionConfig]
    rms_norm_eps: float
    final_logit_softcapping: float | None
    max_position_embeddings: Size
    canvas_length: Size
    bidirectional_images: bool
    bos_token_id: TokenId | None
    eos_token_ids: tuple[TokenId, ...]
    pad_token_id: TokenId
    image_token_id: TokenId | None
    boi_token_id: TokenId | None = None
    eoi_token_id: TokenId | None = None
    vision: VisionConfig | None = None
    dtype: str
    experts_dtype: ExpertsDtype | None = None
    encoder_weights: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)
