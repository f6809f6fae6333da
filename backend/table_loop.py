"""A canvas loop whose operators read what requests ask for beyond the plain step from tables: every row is in the same pass."""

from backend.canvas_loop import CanvasLoop
from backend.extras_tables import ExtrasTables
from backend.job import TokenLogprob
from backend.kv_cache import PagedKVCache
from backend.opening import Opening
from backend.sampling_config import ResolvedSampling
from backend.session import Session


class TableLoop(CanvasLoop):
    """As `CanvasLoop`; subclasses have the vocabulary pass."""

    _plain = False

    def __init__(self, session: Session, cache: PagedKVCache, *, workspace_bytes: int = 512 << 20):
        super().__init__(session, cache, workspace_bytes=workspace_bytes)
        self._tables = ExtrasTables(len(self._step), self._model.canvas_length, self._model.vocab_size, session.device)

    def _start_extras(self, slot: int, sampling: ResolvedSampling, opening: Opening | None) -> None:
        self._tables.start(slot, sampling, opening)

    def logprobs(self, slot: int) -> list[TokenLogprob] | None:
        """See `CanvasLoop.logprobs`."""
        return self._tables.logprobs(slot)
