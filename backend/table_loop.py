"""A canvas loop whose operators read what requests ask for beyond the plain step from tables: every row is in the same pass."""

from backend.canvas_loop import CanvasLoop
from backend.extras_tables import ExtrasTables
from backend.job import TokenLogprob
from backend.kv_cache import PagedKVCache
from backend.sampling_config import ResolvedSampling
from backend.session import Session


class TableLoop(CanvasLoop):
    """As `CanvasLoop`; subclasses have the vocabulary pass."""

    def __init__(self, session: Session, cache: PagedKVCache, *, workspace_bytes: int = 512 << 20):
        super().__init__(session, cache, workspace_bytes=workspace_bytes)
        # More than the plain loop's: a step keeps the logits and nothing else of their size.
        fitting = workspace_bytes // (self._model.vocab_size * session.dtype.itemsize)
        self._chunk_rows = max(1, min(fitting, session.manifest.build.max_head_rows))
        self._tables = ExtrasTables(len(self._step), self._model.canvas_length, self._model.vocab_size, session.device)

    def _start_extras(self, slot: int, sampling: ResolvedSampling) -> None:
        self._tables.start(slot, sampling)

    def logprobs(self, slot: int) -> list[TokenLogprob] | None:
        """See `CanvasLoop.logprobs`."""
        return self._tables.logprobs(slot)
