"""An engine directory made ready to serve: session, tokenizer, generation defaults, KV cache and scheduler put together."""

import logging
from pathlib import Path

import torch
from tokenizers import Tokenizer

from backend.answer_grammar import Grammars
from backend.batch_invariance import check_batch_invariance
from backend.canvas_loop import CanvasLoop
from backend.compiled_loop import CompiledLoop
from backend.encode_pass import warm_up
from backend.expert_gpus import check_others_free
from backend.generation_defaults import GenerationDefaults
from backend.gpu_memory import free_bytes
from backend.kv_cache import PagedKVCache
from backend.planner import EngineLimits, check_free, pass_rows, plan_memory
from backend.prompt_tokens import PromptTokenizer
from backend.scheduler import Scheduler
from backend.session import Session
from contract.manifest import ManifestError, read_manifest
from contract.regular_file import regular
from plugins.batch_invariance import CUT_TOKENS

__all__ = ["Engine", "EngineLimits"]

_logger = logging.getLogger(__name__)


class Engine:
    """Owns everything that serving one engine needs. `scheduler` belongs to one thread; the rest may be read from any."""

    def __init__(self, session: Session, tokenizer: Tokenizer, defaults: GenerationDefaults, limits: EngineLimits):
        """Allocates the KV pages and the canvases; what that comes to is in `plan`, and logged.

        Raises:
            ManifestError: see `plan_memory`, `Grammars.prepare`, and on a GPU `check_free` and `check_batch_invariance`.
        """
        model, build = session.manifest.model, session.manifest.build
        grammars = Grammars(tokenizer, model.vocab_size)
        limits = limits.resolved(build)
        self.plan = plan_memory(session.manifest, limits, device_type=session.device.type)
        for line in self.plan.report().splitlines():
            _logger.info("%s", line)
        if session.device.type == "cuda":
            check_free(self.plan, free_bytes(session.device))
            if self.plan.others:
                check_others_free(self.plan.others)
        self.tokenizer, self.defaults, self.session = tokenizer, defaults, session
        self.bos_token = tokenizer.id_to_token(model.bos_token_id) if model.bos_token_id is not None else None
        self.tokenize = PromptTokenizer(tokenizer, self.bos_token, model.max_position_embeddings)
        cache = PagedKVCache(
            model,
            page_size=build.page_size,
            num_pages=self.plan.num_pages,
            max_sequences=limits.max_sequences,
            max_tokens=model.max_position_embeddings,
            dtype=session.dtype,
            device=session.device,
            shared_multiple=max(1, CUT_TOKENS // build.page_size) if build.batch_invariant else 1,
        )
        max_pass_rows = pass_rows(session.manifest, limits, session.device.type)
        loop = _canvas_loop(session, cache, limits, max_pass_rows // model.canvas_length)
        self.scheduler = Scheduler(
            session,
            cache,
            loop,
            tokenizer,
            grammars=grammars,
            prefix_cache=limits.prefix_cache,
            commit_last=limits.commit_last,
            max_pass_rows=max_pass_rows,
        )
        if session.device.type == "cuda" and build.target == "inductor":  # plans have their kernels inside
            _compile_kernels(session, cache, loop)
            if build.batch_invariant:
                check_batch_invariance(session, cache, batches=loop.batches, head_rows=loop.head_rows)
                torch.cuda.empty_cache()
            loop.prepare()
            warm_up(session, cache)
        else:
            loop.prepare()
        grammars.prepare()

    @classmethod
    def load(cls, engine_dir: Path, limits: EngineLimits, checkpoint_dir: Path | None = None) -> "Engine":
        """Loads an engine directory. What the limits come to is known before the weights are read.

        Raises:
            ManifestError, CheckpointError: see `Session.load`; also for a generation_config.json that is not understood.
        """
        manifest = read_manifest(engine_dir)
        plan_memory(manifest, limits, device_type=manifest.build.device)
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
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read ({error.strerror}); give access to it, or replace it") from None
        return cls(session, _load_tokenizer(engine_dir / "tokenizer.json"), defaults, limits)


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(regular(path)))
    except Exception as error:  # what `tokenizers` raises is a bare Exception
        raise ManifestError(f"{path}: cannot be loaded ({error}); build the engine again with --force") from None


def _canvas_loop(session: Session, cache: PagedKVCache, limits: EngineLimits, max_step_sequences: int) -> CanvasLoop:
    if session.manifest.operators:
        return CompiledLoop(session, cache, workspace_bytes=limits.sampler_workspace_bytes)
    if session.device.type != "cuda":
        return CanvasLoop(session, cache, workspace_bytes=limits.sampler_workspace_bytes)
    from backend.captured_loop import CapturedLoop  # only here: its kernels need triton

    return CapturedLoop(session, cache, workspace_bytes=limits.sampler_workspace_bytes, max_step_sequences=max_step_sequences)


def _compile_kernels(session: Session, cache: PagedKVCache, loop: CanvasLoop) -> None:
    """Those that programs and the loop call, at once, where Triton's compiler does not have them from before."""
    from plugins.triton_launch import only_compiled  # only here: it imports triton

    with only_compiled():
        loop.rehearse()
        warm_up(session, cache)
    torch.cuda.empty_cache()  # what a step of the largest bucket took; as a graph it takes it from its own pool
