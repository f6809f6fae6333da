"""The resolved model: every fact about a checkpoint that shapes a program or the runtime, nothing left to default."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen, strict record: unknown keys raise, so that a file from another version is never half understood."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class ModelConfig(Record):
    """Sizes and constants of one checkpoint of the family (text part).

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
    dtype: str

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)
