"""Traces the programs with `torch.export`: weights are inputs, sizes that vary are named, no weight is read.

Tracing runs on fake tensors, so a 26B model is exported in the memory of its graph.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram

from builder.network import Denoise, Encode, Head
from builder.weights import EMBEDDING, FINAL_NORM, SELF_CONDITIONING, layer_scalar, text_weights
from contract.manifest import Binding, BuildConfig
from contract.model_config import ModelConfig

# Names of sizes that vary → a value to trace with; the values differ from each other and from 0 and 1, which are special.
_TRACED = {"tokens": 6, "sequences": 2, "starts": 3, "pages": 5, "columns": 4, "images": 7, "rows": 9}


@dataclass(frozen=True, kw_only=True)
class TracedProgram:
    """An exported program with the bindings that it is called with, in order: `inputs`, then `weights`."""

    name: str
    exported: ExportedProgram
    inputs: tuple[Binding, ...]
    weights: tuple[str, ...]
    outputs: tuple[Binding, ...]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """A program before tracing: the network module and the bindings it is called with."""

    name: str
    module: nn.Module
    inputs: tuple[Binding, ...]
    weights: tuple[str, ...]


def signatures(config: ModelConfig, build: BuildConfig) -> tuple[Signature, ...]:
    """The programs encode, denoise and head of one checkpoint.

    Bindings of varying size: T tokens (at most max_encode_tokens), B sequences, N pages of each layer type, P page-table
    columns, M image rows, R head rows.
    """
    head_inputs = (_binding("hidden", build.dtype, "rows", config.hidden_size),)
    return (
        Signature(
            name="encode", module=Encode(config), inputs=_encode_bindings(config, build), weights=_encode_weights(config)
        ),
        Signature(
            name="denoise", module=Denoise(config), inputs=_denoise_bindings(config, build), weights=_denoise_weights(config)
        ),
        Signature(name="head", module=Head(), inputs=head_inputs, weights=(EMBEDDING,)),
    )


def _binding(name: str, dtype: str, *shape: int | str) -> Binding:
    return Binding(name=name, dtype=dtype, shape=shape)


def _cache_bindings(config: ModelConfig, build: BuildConfig) -> tuple[Binding, ...]:
    tables = tuple(_binding(f"{each}.page_table", "int32", "sequences", "columns") for each in config.attention)
    pages = tuple(
        _binding(
            f"kv_pages.{layer}",
            build.dtype,
            f"{layer_type}.pages",
            build.page_size,
            2,
            config.attention[layer_type].num_kv_heads,
            config.attention[layer_type].head_dim,
        )
        for layer, layer_type in enumerate(config.layer_types)
    )
    return (_binding("prefix_lengths", "int32", "sequences"), *tables, *pages)


def _encode_bindings(config: ModelConfig, build: BuildConfig) -> tuple[Binding, ...]:
    return (
        _binding("token_ids", "int32", "tokens"),
        _binding("positions", "int32", "tokens"),
        _binding("sequence_starts", "int32", "starts"),
        _binding("image_embeds", build.dtype, "images", config.hidden_size),
        _binding("image_index", "int32", "tokens"),
        _binding("image_block_ids", "int32", "tokens"),
        *_cache_bindings(config, build),
    )


def _denoise_bindings(config: ModelConfig, build: BuildConfig) -> tuple[Binding, ...]:
    canvas = ("sequences", config.canvas_length)
    return (
        _binding("canvas_ids", "int32", *canvas),
        _binding("soft_embeds", build.dtype, *canvas, config.hidden_size),
        *_cache_bindings(config, build),
    )


def _encode_weights(config: ModelConfig) -> tuple[str, ...]:
    """All but what only denoise reads."""
    unused = {layer_scalar(layer, encoder=False) for layer in range(config.num_layers)} | {FINAL_NORM}
    return tuple(name for name in text_weights(config) if name not in unused and not name.startswith(SELF_CONDITIONING))


def _denoise_weights(config: ModelConfig) -> tuple[str, ...]:
    unused = {layer_scalar(layer, encoder=True) for layer in range(config.num_layers)}
    return tuple(name for name in text_weights(config) if name not in unused)


def export_program(signature: Signature, config: ModelConfig, build: BuildConfig) -> TracedProgram:
    """Traces one program with every varying size symbolic, within the limits of `build`."""
    dims = {
        "tokens": Dim("tokens", min=1, max=build.max_encode_tokens),
        "sequences": Dim("sequences", min=1, max=build.max_sequences),
        "starts": Dim("starts", min=2, max=build.max_sequences + 1),
        "columns": Dim("columns", min=1, max=config.max_position_embeddings),
        "images": Dim("images", min=1, max=build.max_encode_tokens),
        "rows": Dim("rows", min=1, max=build.max_head_rows),
        **{f"{each}.pages": Dim(f"{each}_pages", min=1, max=2**30) for each in config.attention},
    }

    def fake(binding: Binding) -> torch.Tensor:
        sizes = [_TRACED[size.rpartition(".")[2]] if isinstance(size, str) else size for size in binding.shape]
        return torch.zeros(sizes, dtype=getattr(torch, binding.dtype))

    shapes = text_weights(config)
    with FakeTensorMode():
        arguments = (
            {binding.name: fake(binding) for binding in signature.inputs},
            {weight: torch.zeros(shapes[weight], dtype=getattr(torch, build.dtype)) for weight in signature.weights},
        )
    dynamic = (
        {
            binding.name: {axis: dims[size] for axis, size in enumerate(binding.shape) if isinstance(size, str)}
            for binding in signature.inputs
        },
        dict.fromkeys(signature.weights),
    )
    with torch.no_grad():
        exported = torch.export.export(signature.module.eval(), arguments, dynamic_shapes=dynamic, strict=False)
    outputs = tuple(
        _binding(
            f"output.{index}", str(node.meta["val"].dtype).removeprefix("torch."), *(_size(s) for s in node.meta["val"].shape)
        )
        for index, node in enumerate(exported.graph.output_node().args[0])
    )
    return TracedProgram(
        name=signature.name, exported=exported, inputs=signature.inputs, weights=signature.weights, outputs=outputs
    )


def _size(size: int | torch.SymInt) -> int | str:
    return size if isinstance(size, int) else str(size)
