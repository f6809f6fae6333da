"""An engine, loaded: its programs with weights and KV pages bound, ready to be called.

The session owns weights and programs; the KV pages belong to the `PagedKVCache` that is bound to it. All of it is on the device
that the engine was built for.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from backend.expert_gpus import connect_gpus
from backend.gpu_memory import free_bytes
from backend.images.preprocess import ImagePatches
from backend.load_progress import ShowProgress, show_progress
from backend.planner import check_weights_fit
from backend.tensorrt_session import load_plans
from backend.weights import bind_weights
from contract.cpu import this_cpu
from contract.manifest import Gpu, Manifest, ManifestError, read_manifest
from plugins import PLUGIN_ABI
from plugins.cpu import load_operators

RunProgram = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""A compiled program: tensors in the manifest's order of inputs, then weights → its outputs."""

_EMBEDDING = "model.decoder.embed_tokens.weight"
_PACKAGED_MODEL = "model"  # what PyTorch calls the only one of a package


class Session:
    """encode, denoise, mixed, head and vision of one engine. Not thread-safe: one owner.

    Use `Session.load` for an engine directory; the constructor takes programs from anywhere, tests for one.
    """

    def __init__(
        self,
        manifest: Manifest,
        programs: Mapping[str, RunProgram],
        weights: Mapping[str, torch.Tensor],
        variants: Mapping[str, Sequence[tuple[int, RunProgram]]] | None = None,
    ):
        """variants: by program, what runs it from some size of its first input on, ascending (`Program.variants`)."""
        self.manifest = manifest
        self.device = torch.device(manifest.build.device)
        self.dtype = getattr(torch, manifest.build.dtype)
        self.embedding = weights[_EMBEDDING]
        """[V, D], for self-conditioning; the tied embedding that `head` reads too."""
        self._programs = {name: [(0, run), *(variants or {}).get(name, ())] for name, run in programs.items()}
        self._weights = {name: [weights[each] for each in manifest.programs[name].weights] for name in programs}
        self._pages: dict[str, torch.Tensor] = {}
        self._no_image = torch.zeros(1, manifest.model.hidden_size, dtype=self.dtype, device=self.device)
        # A byte of a pixel → its value from -1 to 1, rounded as in transformers, whose processor scales it to 0 to 1 first.
        values = (torch.arange(256, dtype=torch.float64) * (1 / 255)).float()
        self._pixel_values = (2 * (values - 0.5)).to(self.dtype).to(self.device)

    @classmethod
    def load(cls, engine_dir: Path, checkpoint_dir: Path | None = None, show: ShowProgress = show_progress) -> "Session":
        """Loads the programs of `engine_dir` and binds the checkpoint's weights; `show` is told how far reading them is.

        Raises:
            ManifestError: no engine there, or one for another version of the operators, for another machine, or damaged.
            CheckpointError: the checkpoint is missing or has changed.
        """
        manifest = read_manifest(engine_dir)
        if manifest.plugin_abi != PLUGIN_ABI:
            raise ManifestError(
                f"{engine_dir}: got plugin ABI {manifest.plugin_abi}, which is another version's of this project, expected "
                f"{PLUGIN_ABI}; build it again with: python -m builder build CHECKPOINT ENGINE, or make engine"
            )
        _check_gpu(manifest.gpu, engine_dir)
        if manifest.build.expert_gpus > 1:
            connect_gpus(manifest, engine_dir)
        if manifest.build.device == "cpu" and manifest.tools.get("cpu") != this_cpu():
            raise ManifestError(
                f"{engine_dir}: built for a CPU {manifest.tools.get('cpu')}, but this one is {this_cpu()}; build it again here"
            )
        if not manifest.programs:
            raise ManifestError(
                f"{engine_dir}: got a manifest alone, expected an engine with its programs; build it with: "
                "python -m builder build CHECKPOINT ENGINE"
            )
        if manifest.build.target == "inductor":
            _check_torch(manifest, engine_dir)
        for file in manifest.program_files:  # all of them before one is loaded, which for a damaged one may end the process
            if fault := manifest.files[file].fault(engine_dir / file):
                raise ManifestError(f"{engine_dir / file}: {fault}; build the engine again with --force")
        if manifest.operators:
            _load_operators(engine_dir / manifest.operators)
        # Programs first: what is wrong with them is known in seconds, and weights may take minutes.
        if manifest.build.target == "tensorrt":
            programs = load_plans(manifest, engine_dir)
        else:
            programs = {name: load_program(engine_dir / program.file) for name, program in manifest.programs.items()}
        variants = {
            name: [(variant.minimum, load_program(engine_dir / variant.file)) for variant in program.variants]
            for name, program in manifest.programs.items()
        }
        if manifest.build.device == "cuda":
            for gpu in range(manifest.build.expert_gpus):
                check_weights_fit(manifest, free_bytes(torch.device("cuda", gpu)), gpu)
        weights = bind_weights(manifest, engine_dir, checkpoint_dir, show)
        return cls(manifest, programs, weights, variants)

    def bind_pages(self, pages: Sequence[torch.Tensor]) -> None:
        """Binds the KV pages of every layer; programs read them, never write them."""
        self._pages = {f"kv_pages.{layer}": tensor for layer, tensor in enumerate(pages)}

    def encode(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        sequence_starts: torch.Tensor,
        prefix_lengths: torch.Tensor,
        tables: Mapping[str, torch.Tensor],
        image_embeds: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
    ) -> Sequence[torch.Tensor]:
        """Keys and values of T new tokens for every layer, [T, 2, K, head_dim] each. All indices are int32, on any device.

        image_embeds: [M, D] of the images among the tokens, as `vision` gives them. image_index: [2, T]; the token's row of
        image_embeds and the number of its image, -1 for text.
        """
        token_ids = self._here(token_ids)
        if image_embeds is None:
            row = block = torch.full_like(token_ids, -1)
        else:
            row, block = self._here(image_index)
            block = block if self.manifest.model.bidirectional_images else torch.full_like(block, -1)
        return self._run(
            "encode",
            token_ids=token_ids,
            positions=self._here(positions),
            sequence_starts=self._here(sequence_starts),
            prefix_lengths=self._here(prefix_lengths),
            image_embeds=self._no_image if image_embeds is None else image_embeds,
            image_index=row,
            image_block_ids=block,
            **_named(tables),
        )

    def denoise(
        self,
        canvas_ids: torch.Tensor,
        soft_embeds: torch.Tensor,
        prefix_lengths: torch.Tensor,
        tables: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Final-norm hidden states [B, C, D] of canvas_ids [B, C] int32 with soft_embeds [B, C, D]."""
        return self._run(
            "denoise", canvas_ids=canvas_ids, soft_embeds=soft_embeds, prefix_lengths=prefix_lengths, **_named(tables)
        )[0]

    @property
    def can_mix(self) -> bool:
        """Whether the engine has the program `mixed`."""
        return "mixed" in self._programs

    def mixed(
        self,
        canvas_ids: torch.Tensor,
        soft_embeds: torch.Tensor,
        prefix_lengths: torch.Tensor,
        tables: Mapping[str, torch.Tensor],
        *,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        starts: torch.Tensor,
        length: torch.Tensor,
        table: Mapping[str, torch.Tensor],
        places: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """As `denoise`; beside it new tokens of one sequence are encoded, and their keys and values written to `places`, before
        the canvases see them.

        token_ids, positions [C] int32, filled up. starts [2] int32: 0 and C. length [1] int32 and table [1, columns]: of the
        sequence, without them. places: by layer type [2, C] int64, see `plugins.attention.mixed_op`.
        """
        new = {"starts": starts, "prefix_lengths": length} | _named(table)
        for kind, (rows, cells) in places.items():
            new |= {f"{kind}.rows": rows, f"{kind}.cells": cells}
        return self._run(
            "mixed",
            canvas_ids=canvas_ids,
            soft_embeds=soft_embeds,
            prefix_lengths=prefix_lengths,
            **_named(tables),
            token_ids=token_ids,
            positions=positions,
            **{f"new.{name}": each for name, each in new.items()},
        )[0]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Raw logits [R, V] of hidden [R, D]."""
        return self._run("head", hidden=hidden)[0]

    def vision(self, image: ImagePatches) -> torch.Tensor:
        """The embeddings [S, D] of one image's tokens."""
        pixels = self._here(torch.tensor(image.patches))
        num_patches = image.positions.shape[0] * image.positions.shape[1]
        return self._run(
            "vision",
            patches=self._pixel_values.index_select(0, pixels.flatten().int()).view(pixels.shape),
            patch_positions=self._here(torch.tensor(image.positions)),
            patch_range=self._here(torch.tensor([0, num_patches], dtype=torch.int32)),
        )[0]

    def _here(self, indices: torch.Tensor) -> torch.Tensor:
        return indices.to(self.device, non_blocking=True)

    def _run(self, name: str, **activations: torch.Tensor) -> Sequence[torch.Tensor]:
        available = self._pages | activations
        inputs = [available[binding.name] for binding in self.manifest.programs[name].inputs]
        run = next(run for minimum, run in reversed(self._programs[name]) if inputs[0].shape[0] >= minimum)
        return run(inputs + self._weights[name])


def _named(tables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{kind}.page_table": table for kind, table in tables.items()}


def _check_gpu(built_for: Gpu | None, engine_dir: Path) -> None:
    """Refuses an engine whose programs hold code for a GPU that is not here."""
    if built_for is None:
        return
    if not torch.cuda.is_available():
        raise ManifestError(
            f"{engine_dir}: built for {built_for}, but PyTorch finds no GPU here; use it on a machine with one, or "
            "build the engine again with --device cpu"
        )
    here = Gpu(name=torch.cuda.get_device_name(), compute_capability=torch.cuda.get_device_capability())
    if here.compute_capability != built_for.compute_capability:
        raise ManifestError(f"{engine_dir}: built for {built_for}, but the GPU here is {here}; build it again on this machine")


def _check_torch(manifest: Manifest, engine_dir: Path) -> None:
    """Packages and operators are C++ compiled against one PyTorch, whose classes another may lay out otherwise: calls may then
    end the process. Builds of a version for other devices ("+cpu") are alike in this."""
    built_with, here = (str(each).partition("+")[0] for each in (manifest.tools.get("torch"), torch.__version__))
    if built_with != here:
        raise ManifestError(
            f"{engine_dir}: built with PyTorch {built_with}, here is {here}; programs run only in their own version: build the "
            "engine again here"
        )


def _load_operators(path: Path) -> None:
    try:
        load_operators(path)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be loaded ({error}); build the engine again with --force") from None


def load_program(path: Path) -> RunProgram:
    """A program of the `inductor` target. It runs on the current stream and may be captured.

    Not with `torch._inductor.aoti_load_package`: to warn of another machine than the program's it compiles a C++ program for
    every instruction set that this CPU may have, for 40 s on the machine of an H200. What a manifest says of the machine is
    checked before.
    """
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), _PACKAGED_MODEL, True, 1, -1)  # one thread, one runner
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ManifestError(f"{path}: cannot be loaded ({first_line}); build the engine again with --force") from None
    return loader.run
