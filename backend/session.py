"""An engine, loaded: its programs with weights and KV pages bound, ready to be called.

The session owns weights and programs; the KV pages belong to the `PagedKVCache` that is bound to it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from backend.weights import bind_weights
from contract.manifest import Manifest, ManifestError, read_manifest
from plugins import PLUGIN_ABI

RunProgram = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
"""A compiled program: tensors in the manifest's order of inputs, then weights → its outputs."""

_EMBEDDING = "model.decoder.embed_tokens.weight"


class Session:
    """encode, denoise and head of one engine. Not thread-safe: one owner.

    Use `Session.load` for an engine directory; the constructor takes programs from anywhere, tests for one.
    """

    def __init__(self, manifest: Manifest, programs: Mapping[str, RunProgram], weights: Mapping[str, torch.Tensor]):
        self.manifest = manifest
        self.device = torch.device("cpu")
        self.dtype = getattr(torch, manifest.build.dtype)
        self.embedding = weights[_EMBEDDING]
        """[V, D], for self-conditioning; the tied embedding that `head` reads too."""
        self._programs = programs
        self._weights = {name: [weights[each] for each in manifest.programs[name].weights] for name in programs}
        self._pages: dict[str, torch.Tensor] = {}
        self._no_image = torch.zeros(1, manifest.model.hidden_size, dtype=self.dtype)

    @classmethod
    def load(cls, engine_dir: Path, checkpoint_dir: Path | None = None) -> "Session":
        """Loads the programs of `engine_dir` and binds the checkpoint's weights.

        Raises:
            ManifestError: no engine there, or one for another version of the operators.
            CheckpointError: the checkpoint is missing or has changed.
        """
        manifest = read_manifest(engine_dir)
        if manifest.plugin_abi != PLUGIN_ABI:
            raise ManifestError(
                f"{engine_dir}: got plugin ABI {manifest.plugin_abi}, expected {PLUGIN_ABI}; "
                "build the engine again with --force"
            )
        for program in manifest.programs.values():
            if not (engine_dir / program.file).exists():
                raise ManifestError(f"{engine_dir / program.file}: missing; build the engine again with --force")
        weights = bind_weights(manifest, engine_dir, checkpoint_dir)
        programs = {name: _load_program(engine_dir / program.file) for name, program in manifest.programs.items()}
        return cls(manifest, programs, weights)

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
    ) -> Sequence[torch.Tensor]:
        """Keys and values of T new tokens for every layer, [T, 2, K, head_dim] each. All arguments are int32."""
        text = torch.full_like(token_ids, -1)
        return self._run(
            "encode",
            token_ids=token_ids,
            positions=positions,
            sequence_starts=sequence_starts,
            prefix_lengths=prefix_lengths,
            image_embeds=self._no_image,
            image_index=text,
            image_block_ids=text,
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

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Raw logits [R, V] of hidden [R, D]."""
        return self._run("head", hidden=hidden)[0]

    def _run(self, name: str, **activations: torch.Tensor) -> Sequence[torch.Tensor]:
        available = self._pages | activations
        inputs = [available[binding.name] for binding in self.manifest.programs[name].inputs]
        return self._programs[name](inputs + self._weights[name])


def _named(tables: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{kind}.page_table": table for kind, table in tables.items()}


def _load_program(path: Path) -> RunProgram:
    try:
        package = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ManifestError(f"{path}: cannot be loaded ({first_line}); build the engine again with --force") from None
    return package.loader.run
