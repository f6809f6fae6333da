"""Whether a GPU has kernels for a model's heads: asked of the attention operator, which wants more of them than the others."""

import torch
from torch import Tensor

from builder.errors import BuildError
from contract.manifest import BuildConfig
from contract.model_config import AttentionConfig, ModelConfig


def check_kernels(model: ModelConfig, build: BuildConfig) -> None:
    """Of the text model: the vision tower fills its heads up to what there are kernels for.

    Raises:
        BuildError: there are none.
    """
    from plugins.attention.launch import attention_launch  # only here: it needs triton

    for layer_type, attention in model.attention.items():
        try:
            attention_launch(_one_token(model.num_attention_heads, attention, build), False, attention.window)
        except ValueError as error:
            raise BuildError(f"{layer_type}: {error}; a CPU takes others, with --device cpu") from error


def _one_token(num_heads: int, attention: AttentionConfig, build: BuildConfig) -> tuple[Tensor, ...]:
    """The operator's inputs in `plugins.attention`'s order, without memory."""

    def tensor(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    dtype, kv_shape = getattr(torch, build.dtype), (2, attention.num_kv_heads, attention.head_dim)
    numbers = (
        tensor(1, num_heads, attention.head_dim, dtype=dtype),
        tensor(1, *kv_shape, dtype=dtype),
        tensor(1, build.page_size, *kv_shape, dtype=dtype),
    )
    return (*numbers, tensor(1, 1), tensor(1), tensor(2), tensor(1))
