"""A checkpoint's shape with random weights on the GPU, made into a session: nothing is read from disk and nothing written."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from random_experts import random_rows

from backend.expert_gpus import connect_gpus
from backend.kv_cache import PagedKVCache
from backend.session import RunProgram, Session, load_program
from builder.compiling import compile_programs
from builder.config import read_model_config
from builder.description import ConfigAlone, describe
from builder.export import signatures
from builder.quantization import FP8
from builder.weights import EMBEDDING, Bound, binding_shapes, bound_weights, of_gpu, text_weights, weight_dtype
from contract.manifest import BuildConfig, Program
from contract.model_config import ModelConfig
from plugins.moe.formats import in_format
from plugins.moe.fp8 import to_fp8
from plugins.moe.nvfp4 import NVFP4_DTYPE, num_columns

Report = Callable[[str], None]


def read_text_model(checkpoint: Path) -> ModelConfig:
    """The checkpoint's configuration without its vision tower: text alone is measured."""
    return read_model_config(checkpoint).model_copy(update={"vision": None})


def random_weights(config: ModelConfig, build: BuildConfig) -> dict[str, torch.Tensor]:
    """Scaled so that activations stay of order one: norms 1, embeddings and products by their fan-in, routers wide awake."""
    weights, shapes = {}, text_weights(config)
    bound = bound_weights(shapes, config, build.model_copy(update={"expert_gpus": 1}))
    for name, shape in binding_shapes(shapes).items():
        if name in weights:  # a scale, made with its weight
            continue
        dtype = weight_dtype(name, config, build.dtype)
        if dtype == NVFP4_DTYPE:
            tensor = random_rows((*shape[:2], num_columns(shape[2])), build.device)
        else:
            tensor = _random(name, shape, build)
        if dtype == FP8:
            tensor, weights[f"{name}_scale"] = to_fp8(tensor)
        if arrangement := bound[name].arrangement:
            arranged = tensor.new_empty(bound[name].shape, dtype=getattr(torch, bound[name].dtype))
            for part, own in zip(arranged.split(4), tensor.split(4), strict=True):
                part.copy_(in_format(own, arrangement.format, arrangement.halves))
            tensor = arranged
        weights[name] = tensor
    return _in_parts(weights, bound_weights(shapes, config, build), build)


def _in_parts(weights: dict[str, torch.Tensor], bound: dict[str, Bound], build: BuildConfig) -> dict[str, torch.Tensor]:
    """With each GPU's part of what several share, there; each whole is freed before the next one is divided."""
    placed: dict[str, torch.Tensor] = {}
    for name, each in bound.items():
        if each.part is None:
            placed[name] = weights.pop(name)
        elif each.part.number == 0:
            for gpu, part in enumerate(weights.pop(name).chunk(each.part.of)):
                place = torch.device(build.device, gpu) if build.device == "cuda" else build.device
                placed[of_gpu(name, gpu)] = part.clone() if gpu == 0 else part.to(place)
    return placed


def _random(name: str, shape: tuple[int, ...], build: BuildConfig) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=getattr(torch, build.dtype), device=build.device)
    if len(shape) == 1:
        return tensor.fill_(1.0)
    if name.endswith("router.proj.weight"):
        return tensor.normal_()
    return tensor.normal_(std=(shape[1] if name == EMBEDDING else shape[-1]) ** -0.5)


def random_session(
    model: ModelConfig,
    checkpoint: Path,
    build: BuildConfig,
    weights: dict[str, torch.Tensor],
    *,
    compiled: bool,
    report: Report,
) -> Session:
    """A session of these weights, its programs compiled as the builder does or the network's own modules."""
    manifest = describe(model, build, ConfigAlone(model), text_weights(model), checkpoint, checkpoint)
    if build.expert_gpus > 1:
        connect_gpus(manifest, checkpoint)
    if not compiled:
        programs, runners = {}, {}
        for each in signatures(model, build):
            programs[each.name] = Program(file="", inputs=each.inputs, weights=each.weights, outputs=())
            runners[each.name] = uncompiled(each, build)
        return Session(manifest.model_copy(update={"programs": programs}), runners, weights)
    with tempfile.TemporaryDirectory() as name:
        directory, started = Path(name), time.perf_counter()
        programs = compile_programs(
            model, build, directory, lambda line: report(f"  {time.perf_counter() - started:6.1f} s  {line}")
        )
        runners = {name: load_program(directory / program.file) for name, program in programs.items()}
        variants = {
            name: [(each.minimum, load_program(directory / each.file)) for each in program.variants]
            for name, program in programs.items()
        }
        report(f"  {time.perf_counter() - started:6.1f} s  loaded")
    return Session(manifest.model_copy(update={"programs": programs}), runners, weights, variants)


def uncompiled(signature, build: BuildConfig) -> RunProgram:
    """The network's own module as a program."""
    signature.module.to(build.device)
    names = [binding.name for binding in signature.inputs]

    @torch.no_grad()
    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        inputs = dict(zip(names, tensors[: len(names)], strict=True))
        output = signature.module(inputs, dict(zip(signature.weights, tensors[len(names) :], strict=True)))
        return output if isinstance(output, list) else [output]

    return run


def random_cache(session: Session, *, max_sequences: int, num_tokens: int, max_tokens: int) -> PagedKVCache:
    """Pages for `num_tokens` tokens of full-attention layers, filled with random numbers, and bound to the session."""
    model, page_size = session.manifest.model, session.manifest.build.page_size
    num_pages = dict.fromkeys(model.attention, -(-num_tokens // page_size))
    for kind, attention in model.attention.items():
        if attention.window:
            num_pages[kind] = min(num_pages[kind], max_sequences * (-(-(attention.window - 1) // page_size) + 1))
    cache = PagedKVCache(
        model,
        page_size=page_size,
        num_pages=num_pages,
        max_sequences=max_sequences,
        max_tokens=max_tokens,
        dtype=session.dtype,
        device=session.device,
    )
    for pages in cache.pages:
        pages.normal_()
    session.bind_pages(cache.pages)
    return cache


def open_sequences(cache: PagedKVCache, lengths: Sequence[int], chunk: int = 8192) -> list[int]:
    """Slots of sequences with so many random tokens in the cache."""
    slots = [cache.open(length) for length in lengths]
    rows = [torch.randn(1, *pages.shape[2:], device=pages.device).to(pages.dtype) for pages in cache.pages]
    for slot, length in zip(slots, lengths, strict=True):
        for begin in range(0, length, chunk):
            count = min(chunk, length - begin)
            cache.append([slot], [count], [row.expand(count, *row.shape[1:]) for row in rows])
    return slots
