"""What the front and the engine worker say to each other, pickled, one record a message.

    front                          engine worker (child process)
      │ ── Submit, Cancel ─────────▶ │
      │ ◀── Ready or LoadFailed ──── │   once, when the engine is loaded
      │ ◀── Report ───────────────── │   after a tick that has news, and as a heartbeat at least every BEAT_INTERVAL_S

Pickle, because both ends are this one program at one version, the parent made the connection, and the records are ours: a
schema of its own would say everything twice. The connection is a pair of sockets that no other process can open.
"""

from dataclasses import dataclass

from backend.errors import ErrorCode, RequestError
from backend.generation_defaults import GenerationDefaults
from backend.images.preprocess import ImagePatches
from backend.job import CanvasOutput, DraftOutput
from backend.metrics import MetricsDelta
from backend.sampling_config import ResolvedSampling
from backend.text_stream import StopScope
from contract.model_config import ModelConfig

BEAT_INTERVAL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Submit:
    """A request. `handle` names it from now on. images, stop_scope, draft_interval_s: see `Scheduler.add`; an image is its
    patches in bytes, 2 MB for 280 soft tokens of the 26B model. queued_at_s: by `time.monotonic`, one clock for both ends."""

    handle: int
    prompt_ids: list[int]
    images: tuple[ImagePatches, ...]
    sampling: ResolvedSampling
    stop_scope: StopScope
    draft_interval_s: float | None
    queued_at_s: float


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Ends a request without another word about it; nothing happens if it has ended."""

    handle: int


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The engine is loaded. `bos_token` opens every prompt that does not open with it; None if the checkpoint has none.
    max_sequences: places in the batch."""

    model: ModelConfig
    bos_token: str | None
    defaults: GenerationDefaults
    max_sequences: int


@dataclass(frozen=True, kw_only=True)
class LoadFailed:
    """The engine cannot be used; one line that says why. The worker ends."""

    message: str


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A request ended with an error: the parts of a RequestError."""

    code: ErrorCode
    message: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What has happened since the last report. The worker is alive: it sends these from the thread that runs the engine.

    started: requests that got a place in the batch. outputs: (handle, output) in the order of their making. metrics: what was
    measured, now and then.
    """

    started: tuple[int, ...] = ()
    outputs: tuple[tuple[int, CanvasOutput | DraftOutput | Failure], ...] = ()
    metrics: MetricsDelta | None = None


def is_last(output: CanvasOutput | DraftOutput | Failure | RequestError) -> bool:
    """Whether a request ends with this output."""
    return isinstance(output, Failure | RequestError) or (isinstance(output, CanvasOutput) and output.finish_reason is not None)
