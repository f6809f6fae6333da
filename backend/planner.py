"""What serving an engine takes in memory, computed before anything is allocated.

    runtime      what is there before the first tensor: the process with its libraries on the CPU, the device's context, kernels
                 and libraries' workspaces on a GPU
    weights      every weight once, in the dtype that it is bound in
    workspace    of the largest pass (`pass_memory`). It does not grow with the number of sequences on the CPU: no pass has more
                 than `max_pass_rows` rows, nothing of rows x vocabulary outlives a chunk
    graphs       on a GPU: the captured denoising steps. They share memory with each other, and with no other pass
    state        of a sequence: soft embeddings, a few numbers a canvas position, room for a bias of every token
    KV pages     of a sequence: every token in full-attention layers, the last window in sliding ones

How many pages there are:
1. `max_cached_tokens`, if it is given: so many tokens over all sequences.
2. `memory_bytes`, if it is given: what is left of it when the rest is paid for, as the longest equal share for every sequence.
3. Else so many that every sequence may have 8,192 tokens (or as many as the model has positions), and four if there are fewer.

In each case a single sequence may use more than its share, as far as there are pages. With the prefix cache sliding layers get
as many pages again where memory allows, for windows of prefixes that no sequence holds.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from backend.expert_gpus import OtherGpus, other_gpus
from backend.pass_memory import (
    denoise_bytes,
    encode_bytes,
    item_bytes,
    sampler_bytes,
    state_bytes,
    token_bytes,
    vision_bytes,
)
from contract.manifest import BuildConfig, Manifest, ManifestError, mixes
from contract.model_config import LayerType

_DEFAULT_SEQUENCES, _DEFAULT_SEQUENCE_TOKENS = 16, 8192
_FEWEST_SEQUENCES = 4  # that the default counts with
_RUNTIME_BYTES = {"cpu": 400_000_000, "cuda": 1_000_000_000}
"""cpu: resident with PyTorch 2.13, 240 MB once the engine's modules are imported, 390 with compiled programs loaded. cuda: an
estimate."""
_TENSORRT_ELEMENTS = 2**31 - 1
"""Of one tensor of a plan at most, see `builder.targets.tensorrt_profiles`."""
_REPORTED_LENGTHS = (1024, 4096, 8192, 16_384, 65_536, 262_144)
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What an engine may use.

    max_sequences: sequences denoised at once; None is 16, or as many as the engine takes. max_cached_tokens: tokens that the KV
    pages of full-attention layers hold, over all sequences. memory_bytes: for everything together, weights included. Without
    either, see the module docstring.

    prefix_cache: keep committed pages for prompts with the same beginning. commit_last: also the last canvas of every request.
    max_pass_rows: canvas positions that one denoising pass takes; None is `max_encode_tokens` on the CPU, where larger passes
    are no faster and take memory, and no limit on a GPU, where they are. sampler_workspace_bytes: bound of the head's and
    sampler's chunk.
    """

    max_sequences: int | None = None
    max_cached_tokens: int | None = None
    memory_bytes: int | None = None
    prefix_cache: bool = True
    commit_last: bool = False
    max_pass_rows: int | None = None
    sampler_workspace_bytes: int = 512 << 20

    def __post_init__(self):
        for name in ("max_sequences", "max_cached_tokens", "memory_bytes", "max_pass_rows", "sampler_workspace_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ManifestError(f"{name}: got {value}, expected at least 1")
        if self.max_cached_tokens is not None and self.memory_bytes is not None:
            raise ManifestError("max_cached_tokens and memory_bytes: got both, but each decides how many KV pages there are")

    def resolved(self, build: BuildConfig) -> "EngineLimits":
        """With a number of sequences. Raises ManifestError for what the engine cannot do."""
        most = build.max_sequences
        if build.batch_invariant and self.commit_last:
            raise ManifestError(
                "commit_last: got true, expected false: a batch-invariant engine keeps no answers; leave it out"
            )
        wanted = min(_DEFAULT_SEQUENCES, most) if self.max_sequences is None else self.max_sequences
        if wanted > most:
            raise ManifestError(
                f"max_sequences: got {wanted}, expected 1 to {most}; lower it, "
                "or rebuild the engine with a larger --max-sequences"
            )
        return replace(self, max_sequences=wanted)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Sizes in bytes; see the module docstring."""

    max_sequences: int
    max_positions: int
    page_size: int
    kept_tokens: Mapping[LayerType, int | None]  # tokens before it that a token sees; None: all
    page_bytes: Mapping[LayerType, int]  # a page in all layers of the type
    num_pages: Mapping[LayerType, int]
    runtime_bytes: int
    weights_bytes: int
    workspace_bytes: int
    graphs_bytes: int
    state_bytes: int  # of one sequence
    others: OtherGpus | None = None  # that have experts; all else is of the first GPU

    @property
    def kv_bytes(self) -> int:
        return sum(count * self.page_bytes[kind] for kind, count in self.num_pages.items())

    @property
    def states_bytes(self) -> int:
        """Of all sequences, and of the idle row that fills up a batch."""
        return (self.max_sequences + 1) * self.state_bytes

    @property
    def total_bytes(self) -> int:
        passes = self.workspace_bytes + self.graphs_bytes
        return self.runtime_bytes + self.weights_bytes + passes + self.states_bytes + self.kv_bytes

    def num_sequences(self, num_tokens: int) -> int:
        """How many sequences of so many tokens fit at once."""
        needed = self.needed_by_each(num_tokens)
        return min(self.max_sequences, *(self.num_pages[kind] // count for kind, count in needed.items() if count))

    def needed_by_each(self, num_tokens: int) -> dict[LayerType, int]:
        """See `pages_needed`."""
        return pages_needed(num_tokens, self.page_size, self.kept_tokens)

    def report(self) -> str:
        """The plan in a few lines, for people."""
        lengths = [length for length in _REPORTED_LENGTHS if length < self.max_positions] + [self.max_positions]
        fitting = ", ".join(f"{self.num_sequences(length)} of {length:,}" for length in lengths)
        pages = ", ".join(f"{count:,} {kind}" for kind, count in self.num_pages.items())
        graphs = f" + graphs {self.graphs_bytes / _GB:.2f}" if self.graphs_bytes else ""
        return (
            f"memory  {self.total_bytes / _GB:.2f} GB = runtime {self.runtime_bytes / _GB:.2f} + weights "
            f"{self.weights_bytes / _GB:.2f} + workspace {self.workspace_bytes / _GB:.2f}{graphs} + {self.max_sequences} "
            f"sequences {self.states_bytes / _GB:.3f} + KV pages {self.kv_bytes / _GB:.2f} ({pages}, {self.page_size} tokens "
            "each)\n"
            f"fits    sequences of so many tokens: {fitting}" + (f"\n{self.others.report()}" if self.others else "")
        )


def plan_memory(manifest: Manifest, limits: EngineLimits, *, device_type: str = "cpu") -> MemoryPlan:
    """The plan for an engine under `limits`.

    Raises:
        ManifestError: max_sequences is more than the engine takes, or memory_bytes does not hold what every engine needs.
    """
    model, build = manifest.model, manifest.build
    limits = limits.resolved(build)
    kept = {kind: each.window - 1 if each.window else None for kind, each in model.attention.items()}
    page_bytes = {kind: build.page_size * token_bytes(model, kind, build.dtype) for kind in model.attention}
    fixed = {
        "runtime_bytes": _RUNTIME_BYTES[device_type],
        "weights_bytes": weights_bytes(manifest),
        "workspace_bytes": _workspace_bytes(manifest, limits, device_type),
        "graphs_bytes": _graphs_bytes(manifest, limits, device_type),
        "state_bytes": state_bytes(model, build),
        "others": other_gpus(manifest, weights_bytes(manifest, 1), _most_rows(manifest, limits), _RUNTIME_BYTES["cuda"]),
    }

    def with_pages(tokens_each: int, sequences: int) -> MemoryPlan:
        needed = pages_needed(tokens_each, build.page_size, kept)
        return MemoryPlan(
            max_sequences=limits.max_sequences,
            max_positions=model.max_position_embeddings,
            page_size=build.page_size,
            kept_tokens=kept,
            page_bytes=page_bytes,
            num_pages={kind: sequences * count for kind, count in needed.items()},
            **fixed,
        )

    longest = model.max_position_embeddings
    if limits.max_cached_tokens is not None:  # 1.
        total = -(-min(limits.max_cached_tokens, limits.max_sequences * longest) // build.page_size)
        window = with_pages(longest, limits.max_sequences).num_pages
        num_pages = {kind: total if kept[kind] is None else min(total, window[kind]) for kind in kept}
        plan = replace(with_pages(1, 1), num_pages=num_pages)
    elif limits.memory_bytes is not None:  # 2.
        tokens, over = 0, longest + 1  # the largest that fits, the smallest that does not
        while over - tokens > 1:
            middle = (tokens + over) // 2
            fits = with_pages(middle, limits.max_sequences).total_bytes <= limits.memory_bytes
            tokens, over = (middle, over) if fits else (tokens, middle)
        plan = with_pages(tokens, limits.max_sequences)
        if tokens < model.canvas_length:
            least = with_pages(model.canvas_length, limits.max_sequences).total_bytes
            least_gb = math.ceil(100 * least / _GB) / 100  # enough, if it is given back
            raise ManifestError(
                f"memory_bytes: got {limits.memory_bytes / _GB:.2f} GB, expected at least {least_gb:.2f} GB for weights "
                f"({plan.weights_bytes / _GB:.2f}), runtime and passes ({_beside(plan) / _GB:.2f}) and {limits.max_sequences} "
                f"sequences of one canvas ({model.canvas_length} tokens); allow more, or lower max_sequences"
            )
    else:  # 3.
        plan = with_pages(min(longest, _DEFAULT_SEQUENCE_TOKENS), max(limits.max_sequences, _FEWEST_SEQUENCES))
    plan = _with_kept_windows(plan, limits) if limits.prefix_cache else plan
    return replace(plan, num_pages={kind: min(count, _most_pages(manifest, kind)) for kind, count in plan.num_pages.items()})


def _most_pages(manifest: Manifest, kind: LayerType) -> int:
    """That programs take of layers of a kind."""
    attention, build = manifest.model.attention[kind], manifest.build
    if build.target != "tensorrt":
        return sys.maxsize
    return _TENSORRT_ELEMENTS // (build.page_size * 2 * attention.num_kv_heads * attention.head_dim)


def weights_bytes(manifest: Manifest, gpu: int = 0) -> int:
    """Of every weight once that a GPU has, as it is bound."""
    return sum(math.prod(each.shape) * item_bytes(each.dtype) for each in manifest.weights_of(gpu))


def check_weights_fit(manifest: Manifest, free_bytes: int, gpu: int = 0) -> None:
    """Compares what the weights of a GPU take with what is free there, before one is loaded.

    Raises:
        ManifestError: it is more.
    """
    if (needed := weights_bytes(manifest, gpu)) > free_bytes:
        raise ManifestError(
            f"memory: got {free_bytes / _GB:.2f} GB free, expected {needed / _GB:.2f} GB for the weights; end what else uses "
            f"{f'GPU {gpu}' if gpu else 'the GPU'}, take a larger one, or build an engine whose experts take less "
            "(docs/int4.md)"
        )


def check_free(plan: MemoryPlan, free_bytes: int) -> None:
    """Compares what is left to allocate, once runtime and weights are there, with what is free.

    Raises:
        ManifestError: it is more.
    """
    needed = plan.total_bytes - plan.runtime_bytes - plan.weights_bytes
    if needed > free_bytes:
        raise ManifestError(
            f"memory: got {free_bytes / _GB:.2f} GB free beside the weights, expected {needed / _GB:.2f} GB for "
            f"{plan.max_sequences} sequences, their KV pages ({plan.kv_bytes / _GB:.2f}) and passes; set memory_bytes to "
            "what may be used, or lower max_sequences or max_cached_tokens"
        )


def _with_kept_windows(plan: MemoryPlan, limits: EngineLimits) -> MemoryPlan:
    most = max((count for kind, count in plan.num_pages.items() if plan.kept_tokens[kind] is None), default=None)
    twice = {
        kind: count if plan.kept_tokens[kind] is None else 2 * count if most is None else max(count, min(2 * count, most))
        for kind, count in plan.num_pages.items()
    }
    larger = replace(plan, num_pages=twice)
    fits = limits.memory_bytes is None or larger.total_bytes <= limits.memory_bytes
    return larger if fits else plan


def pages_needed(num_tokens: int, page_size: int, kept: Mapping[LayerType, int | None]) -> dict[LayerType, int]:
    """The most pages of each layer type that a sequence of `num_tokens` cached tokens ever owns at once. A window of n tokens
    that starts in the middle of a page touches one page more."""
    pages = -(-num_tokens // page_size)
    return {kind: pages if each is None else min(pages, -(-each // page_size) + 1) for kind, each in kept.items()}


def pass_rows(manifest: Manifest, limits: EngineLimits, device_type: str) -> int:
    """Rows of the largest denoising pass."""
    every = limits.max_sequences * manifest.model.canvas_length
    limit = limits.max_pass_rows or (manifest.build.max_encode_tokens if device_type == "cpu" else every)
    return max(manifest.model.canvas_length, min(limit, every))


def _step_rows(manifest: Manifest, limits: EngineLimits, device_type: str) -> int:
    """Rows of the largest denoising pass, with the new tokens that may go with it."""
    there = manifest.build.model_copy(update={"device": device_type})
    new_tokens = manifest.model.canvas_length if mixes(manifest.model, there) else 0
    return pass_rows(manifest, limits, device_type) + new_tokens


def _most_rows(manifest: Manifest, limits: EngineLimits) -> int:
    """Of any pass on a GPU."""
    return max(manifest.build.max_encode_tokens, _step_rows(manifest, limits, "cuda"))


def _beside(plan: MemoryPlan) -> int:
    return plan.runtime_bytes + plan.workspace_bytes + plan.graphs_bytes


def _workspace_bytes(manifest: Manifest, limits: EngineLimits, device_type: str) -> int:
    """Of the largest of an encode pass, an image and a step, on a GPU the one before a capture; of a step, the pass and the
    sampler, whose memory the allocator keeps apart."""
    model, build = manifest.model, manifest.build
    step = denoise_bytes(model, build, _step_rows(manifest, limits, device_type), device_type)
    plain = device_type != "cuda" and not manifest.operators
    step += sampler_bytes(model, build, limits.sampler_workspace_bytes, plain=plain)
    return max(encode_bytes(model, build, device_type), vision_bytes(model, build), step)


def _graphs_bytes(manifest: Manifest, limits: EngineLimits, device_type: str) -> int:
    """Of the graphs of the largest bucket; the others find room in their memory."""
    if device_type != "cuda":
        return 0
    model, build = manifest.model, manifest.build
    step = denoise_bytes(model, build, _step_rows(manifest, limits, device_type), device_type)
    return step + sampler_bytes(model, build, limits.sampler_workspace_bytes, plain=False)
