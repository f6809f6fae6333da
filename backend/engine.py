"""An engine directory made ready to serve: session, tokenizer, generation defaults, KV cache and scheduler put together."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from backend.canvas_loop import CanvasLoop
from backend.generation_defaults import GenerationDefaults
from backend.kv_cache import PagedKVCache
from backend.scheduler import Scheduler
from backend.session import Session
from contract.manifest import ManifestError


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """max_sequences: sequences denoised at once. max_cached_tokens: tokens that the KV pages of full-attention layers hold,
    over all sequences; None is as many as fit `_DEFAULT_CACHE_BYTES`, and never more than the sequences can use."""

    max_sequences: int = 16
    max_cached_tokens: int | None = None


_DEFAULT_CACHE_BYTES = 4 << 30


class Engine:
    """Owns everything that serving one engine needs. `scheduler` belongs to one thread; the rest may be read from any."""

    def __init__(self, session: Session, tokenizer: Tokenizer, defaults: GenerationDefaults, limits: EngineLimits):
        model, build = session.manifest.model, session.manifest.build
        if not 1 <= limits.max_sequences <= build.max_sequences:
            raise ManifestError(
                f"max_sequences: got {limits.max_sequences}, expected 1 to {build.max_sequences}; "
                "rebuild the engine with a larger --max-sequences"
            )
        self.tokenizer, self.defaults, self.session = tokenizer, defaults, session
        self._bos = tokenizer.id_to_token(model.bos_token_id) if model.bos_token_id is not None else None
        cache_tokens = limits.max_cached_tokens or _default_cached_tokens(session, limits)
        num_pages = {}
        for kind, attention in model.attention.items():
            num_pages[kind] = -(-cache_tokens // build.page_size)
            if attention.window:
                most = limits.max_sequences * (-(-(attention.window - 1) // build.page_size) + 1)
                num_pages[kind] = min(num_pages[kind], most)
        cache = PagedKVCache(
            model,
            page_size=build.page_size,
            num_pages=num_pages,
            max_sequences=limits.max_sequences,
            max_tokens=model.max_position_embeddings,
            dtype=session.dtype,
            device=session.device,
        )
        self.scheduler = Scheduler(session, cache, CanvasLoop(session, cache), tokenizer)

    @classmethod
    def load(cls, engine_dir: Path, limits: EngineLimits, checkpoint_dir: Path | None = None) -> "Engine":
        """Loads an engine directory.

        Raises:
            ManifestError, CheckpointError: see `Session.load`; also for a generation_config.json that is not understood.
        """
        session = Session.load(engine_dir, checkpoint_dir)
        path = engine_dir / "generation_config.json"
        try:
            defaults = (
                GenerationDefaults.from_json(path)
                if path.exists()
                else GenerationDefaults.from_json({"eos_token_id": list(session.manifest.model.eos_token_ids)})
            )
        except ValueError as error:
            raise ManifestError(str(error)) from None
        return cls(session, Tokenizer.from_file(str(engine_dir / "tokenizer.json")), defaults, limits)

    def tokenize(self, prompt: str) -> list[int]:
        """The prompt's tokens, special tokens in the text recognised; the tokenizer's <bos> is added unless the text starts
        with one."""
        has_bos = self._bos is not None and prompt.startswith(self._bos)
        return self.tokenizer.encode(prompt, add_special_tokens=not has_bos).ids


def _default_cached_tokens(session: Session, limits: EngineLimits) -> int:
    model = session.manifest.model
    token_bytes = sum(
        2 * model.attention[kind].num_kv_heads * model.attention[kind].head_dim * session.dtype.itemsize
        for kind in model.layer_types
        if not model.attention[kind].window
    )
    usable = limits.max_sequences * model.max_position_embeddings
    return usable if not token_bytes else max(1, min(usable, _DEFAULT_CACHE_BYTES // token_bytes))
