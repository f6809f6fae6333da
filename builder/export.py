"""Traces the programs with `torch.export`: weights are inputs, sizes that vary are named, no weight is read.

Tracing runs on fake tensors, so a 26B model is exported in the memory of its graph.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram

from builder.errors import BuildError
from builder.network import Denoise, Encode, Head, Mixed
from builder.vision_network import Vision
from builder.weights import EMBEDDING, all_weights, bound_weights, of_pass, text_weights, vision_weights
from contract.manifest import Binding, BuildConfig, Device, mixes
from contract.model_config import SOFT_TOKEN_BUDGETS, ModelConfig
from plugins import PLAIN_DECOMPOSITIONS

# Names of sizes that vary → a value to trace with, above their minimum; they differ from each other and from 0 and 1, which are
# special.
_TRACED = {"tokens": 6, "sequences": 2, "starts": 3, "pages": 5, "columns": 4, "images": 7, "rows": 9, "soft_tokens": 8}

# More than any GPU's memory holds. TensorRT refuses a profile in which one tensor could have 2**40 elements.
_MAX_CACHED_TOKENS = 2**25
CALLED_FROM = 4096
"""Tokens from which on encode for a GPU calls the feed-forward operator, whose launches are Python; with fewer it is opened.
NVIDIA H200, 26B shape, packed experts, opened / called: 8192 tokens 126.6 / 121.8 ms, 2048 tokens 34.6 / 33.5, but 44.0 while
other processes kept the host's cores busy, which at 8192 is hidden behind the kernels."""

WITHOUT_ONNX = ("mixed",)
"""Programs that write into their inputs, which ONNX has no words for."""

# Rows at which the experts' tile changes, 32 and 128 rows an expert with 128 experts of which 8 are chosen, and CALLED_FROM.
_MORE_ROWS = (512, 2048, CALLED_FROM)


@dataclass(frozen=True, kw_only=True)
class TracedProgram:
    """An exported program with the bindings that it is called with, in order: `inputs`, then `weights`; all on `device`.

    calls_feed_forward: on a GPU the operator stays a call, see `builder.targets.inductor`.
    """

    name: str
    calls_feed_forward: bool
    device: Device
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
    """The programs encode, denoise and head of one checkpoint, mixed, where it is of use, and vision, if it has a vision tower.

    Bindings of varying size: T tokens (at most max_encode_tokens), B sequences, N pages of each layer type, P page-table
    columns, M image rows, R head rows, S soft tokens of one image.
    """
    names, choices = _text_bindings(config, build), _stack_choices(build)
    head_inputs = (_binding("hidden", build.dtype, "rows", config.hidden_size),)
    text = (
        Signature(
            name="encode",
            module=Encode(config, **choices),
            inputs=_encode_bindings(config, build),
            weights=of_pass(names, encoder=True),
        ),
        Signature(
            name="denoise",
            module=Denoise(config, **choices),
            inputs=_denoise_bindings(config, build),
            weights=of_pass(names, encoder=False),
        ),
        Signature(name="head", module=Head(), inputs=head_inputs, weights=(EMBEDDING,)),
    )
    if mixes(config, build):
        text += (mixed_signature(config, build),)
    if config.vision is None:
        return text
    inputs, weights = _vision_bindings(config, build), tuple(vision_weights(config))
    return (*text, Signature(name="vision", module=Vision(config), inputs=inputs, weights=weights))


def mixed_signature(config: ModelConfig, build: BuildConfig) -> Signature:
    """The program mixed. Its new tokens are always as many as a canvas has."""
    names = _text_bindings(config, build)
    return Signature(
        name="mixed",
        module=Mixed(config, **_stack_choices(build)),
        inputs=(*_denoise_bindings(config, build), *_new_bindings(config)),
        weights=tuple(dict.fromkeys((*of_pass(names, encoder=False), *of_pass(names, encoder=True)))),
    )


def _text_bindings(config: ModelConfig, build: BuildConfig) -> tuple[str, ...]:
    return tuple(bound_weights(text_weights(config), config, build))


def _stack_choices(build: BuildConfig) -> dict[str, bool | int]:
    fp8_rows = build.expert_activations == "float8"
    return {"fp8_rows": fp8_rows, "batch_invariant": build.batch_invariant, "expert_gpus": build.expert_gpus}


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


def _new_bindings(config: ModelConfig) -> tuple[Binding, ...]:
    count = config.canvas_length
    of_types = (
        (
            _binding(f"new.{each}.page_table", "int32", 1, "columns"),
            _binding(f"new.{each}.rows", "int64", count),
            _binding(f"new.{each}.cells", "int64", count),
        )
        for each in config.attention
    )
    return (
        _binding("token_ids", "int32", count),
        _binding("positions", "int32", count),
        _binding("new.starts", "int32", 2),
        _binding("new.prefix_lengths", "int32", 1),
        *(binding for of_type in of_types for binding in of_type),
    )


def _vision_bindings(config: ModelConfig, build: BuildConfig) -> tuple[Binding, ...]:
    patches = ("soft_tokens", config.vision.pooling_kernel_size**2)
    return (
        _binding("patches", build.dtype, *patches, 3 * config.vision.patch_size**2),
        _binding("patch_positions", "int32", *patches, 2),
        _binding("patch_range", "int32", 2),
    )


def size_limits(config: ModelConfig, build: BuildConfig) -> dict[str, tuple[int, int]]:
    """The name of each size that varies → its minimum and maximum."""
    return {
        "tokens": (1, build.max_encode_tokens),
        "sequences": (1, build.max_sequences),
        "starts": (2, build.max_sequences + 1),
        "columns": (1, config.max_position_embeddings),
        "images": (1, build.max_encode_tokens),
        "rows": (1, build.max_head_rows),
        "soft_tokens": (1, min(SOFT_TOKEN_BUDGETS[-1], build.max_encode_tokens)),
        **{f"{each}.pages": (1, _MAX_CACHED_TOKENS // build.page_size) for each in config.attention},
    }


def minimums(signature: Signature, build: BuildConfig) -> tuple[int, ...]:
    """From which sizes on a program is compiled once more, ascending; the first is 1.

    A kernel's tile depends on the number of rows and is chosen when it is compiled: encode for a GPU, where few rows are
    bound by memory and many by arithmetic, is compiled for few, some, many and very many, and for `max_encode_tokens` alone
    where the most rows start there: chunks of long prompts have just so many. float32 has one tile. Of denoise, the kernels of
    the experts are chosen when it is captured. Compiled for other sizes, what is between the kernels may round otherwise, so a
    batch-invariant build has one encode program, in which they are chosen at each call; so they are where GPUs share experts.
    """
    at_each_call = build.batch_invariant or build.expert_gpus > 1
    if build.device == "cpu" or build.dtype == "float32" or at_each_call or signature.name != "encode":
        return (1,)
    return (1, *(rows for rows in _MORE_ROWS if rows <= build.max_encode_tokens))


def export_program(signature: Signature, config: ModelConfig, build: BuildConfig, minimum: int = 1) -> TracedProgram:
    """Traces one program for the device of `build`, with every varying size symbolic, within its limits.

    minimum: the least tokens of encode.

    The device need not be here; but what was traced for one that is not cannot be compiled.

    Raises:
        BuildError: it cannot be traced.
    """
    limits = size_limits(config, build)
    least = {"tokens": minimum} if signature.name == "encode" else {}
    traced = _TRACED | {size: min(least[size] + 10, limits[size][1]) for size in least if least[size] > 1}

    def dim(name: str, smallest: int, most: int) -> Dim:
        # A size that could have one value alone would be no size that varies; the session keeps to the limits.
        fewest = least.get(name, smallest)
        largest = max(most, fewest + 1, traced[name.rpartition(".")[2]])
        return Dim(name.replace(".", "_"), min=fewest, max=largest)

    dims = {name: dim(name, *limit) for name, limit in limits.items()}

    def fake(binding: Binding) -> torch.Tensor:
        sizes = [traced[size.rpartition(".")[2]] if isinstance(size, str) else size for size in binding.shape]
        return torch.zeros(sizes, dtype=getattr(torch, binding.dtype))

    bound = bound_weights(all_weights(config), config, build)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with fakes, torch.device(build.device):
        arguments = (
            {binding.name: fake(binding) for binding in signature.inputs},
            {
                weight: torch.zeros(bound[weight].shape, dtype=getattr(torch, bound[weight].dtype))
                for weight in signature.weights
            },
        )
    module = _placed(signature.module.eval(), build.device, fakes)
    dynamic = (
        {
            binding.name: {axis: dims[size] for axis, size in enumerate(binding.shape) if isinstance(size, str)}
            for binding in signature.inputs
        },
        dict.fromkeys(signature.weights),
    )
    with tracing(signature.name), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own, about its pickled tree specs
        exported = torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)
        # Head and vision have none of these operators, and to look for them PyTorch traces a program again.
        if build.device == "cpu" and any(node.target in PLAIN_DECOMPOSITIONS for node in exported.graph.nodes):
            exported = exported.run_decompositions(PLAIN_DECOMPOSITIONS)
    values = {node.name: node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")}
    names = {
        str(symbol): size
        for name, binding in zip(exported.graph_signature.user_inputs, signature.inputs, strict=False)  # weights follow
        for symbol, size in zip(values[name].shape, binding.shape, strict=True)
        if isinstance(size, str)
    }
    outputs = tuple(
        _binding(
            f"output.{index}",
            str(node.meta["val"].dtype).removeprefix("torch."),
            *(names[str(size)] if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape),
        )
        for index, node in enumerate(exported.graph.output_node().args[0])
    )
    return TracedProgram(
        name=signature.name if minimum == 1 else f"{signature.name}.{minimum}",
        calls_feed_forward=signature.name in ("denoise", "mixed") or build.batch_invariant or minimum >= CALLED_FROM,
        device=build.device,
        exported=exported,
        inputs=signature.inputs,
        weights=signature.weights,
        outputs=outputs,
    )


@contextmanager
def tracing(program: str) -> Iterator[None]:
    """Around what PyTorch traces. Raises BuildError, in one line, for whatever it and the operators' own checks raise."""
    try:
        yield
    except Exception as error:
        first, *_ = [line.strip() for line in str(error).splitlines() if line.strip()] or ["without a word"]
        raise BuildError(
            f"program {program}: cannot be traced ({type(error).__name__}: {first}); expected sizes that its operators take, "
            "see the checkpoint's config.json"
        ) from error


def _placed(module: nn.Module, device: Device, fakes: FakeTensorMode) -> nn.Module:
    """The module with its constants on the device: the real ones, or fake ones where the device is not here."""
    if device == "cpu" or torch.cuda.is_available():
        return module.to(device)
    with fakes:
        for part in module.modules():
            for name, constant in part.named_buffers(recurse=False):
                setattr(part, name, torch.empty_like(fakes.from_tensor(constant), device=device))
    return module
