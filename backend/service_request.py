"""One request of the service, from `submit` to its last output."""

import logging
from dataclasses import dataclass

from backend.errors import RequestError
from backend.images.preprocess import ImagePatches
from backend.job import CanvasOutput, DraftOutput, OnOutput
from backend.sampling_config import ResolvedSampling
from backend.text_stream import StopScope

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ServiceRequest:
    """`sent`: the worker has it, its images too, which are not kept here any longer. `started`: it has a place in the batch."""

    prompt_ids: list[int]
    images: tuple[ImagePatches, ...]
    sampling: ResolvedSampling
    on_output: OnOutput
    stop_scope: StopScope
    draft_interval_s: float | None
    queued_at_s: float
    sent: bool = False
    started: bool = False

    def call(self, output: CanvasOutput | DraftOutput | RequestError) -> None:
        """Hands an output over; whatever `on_output` raises concerns this request alone."""
        try:
            self.on_output(output)
        except Exception:
            _logger.exception("a request's on_output failed; the others go on")
