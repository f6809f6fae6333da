"""The settings of one model: what can be chosen, its bounds and its default, once.

Settings ──▶ `parameters` and `instance_group` of config.pbtxt ──▶ Triton ──▶ initialize(args) ──▶ Settings
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from backend.images.limits import MAX_IMAGES, ImageLimits
from backend.parameters import INT32_MAX, shown
from backend.service_limits import ServiceLimits
from backend.worker_process import WorkerConfig
from contract.model_config import SOFT_TOKEN_BUDGETS

_MOST_S = 1e9  # what waits for a socket or a lock cannot count to much more
Seconds = Annotated[float, Field(ge=0, le=_MOST_S, allow_inf_nan=False)]


def _one_of_the_budgets(value: int) -> int:
    if value not in (0, *SOFT_TOKEN_BUDGETS):
        raise ValueError("none of the budgets")
    return value


SoftTokens = Annotated[int, AfterValidator(_one_of_the_budgets)]
Limit = Annotated[float, Field(ge=1, le=_MOST_S, allow_inf_nan=False)]  # seconds; what is healthy is silent for part of one


class Settings(BaseModel):
    """One model's settings; the descriptions are the documentation. Unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine_dir: str = Field(
        "../../engines/diffusiongemma",
        min_length=1,
        description="engine directory; a relative one starts at the folder of config.pbtxt",
    )
    max_sequences: int = Field(
        0, ge=0, description="sequences denoised at once, at most what the engine was built for; 0: 16, or as many as that"
    )
    max_cached_tokens: int = Field(0, ge=0, description="tokens that the KV pages hold over all sequences; 0: see memory_bytes")
    memory_bytes: int = Field(
        0, ge=0, description="memory for everything, weights included; 0: KV pages for 8,192 tokens a sequence"
    )
    prefix_cache: bool = Field(True, description="true keeps the KV pages of a prompt for prompts that begin alike")
    commit_last: bool = Field(False, description="true keeps those of answers too, at the cost of a pass each, for next turns")
    max_pass_rows: int = Field(0, ge=0, description="canvas positions that one denoising pass takes; 0: what suits the device")
    cpu_threads: int = Field(0, ge=0, description="threads that the engine's worker computes with on the CPU; 0: all cores")
    default_max_tokens: int = Field(
        0, ge=0, le=INT32_MAX, description="max_tokens of requests that do not say it; 0: the checkpoint's"
    )
    max_queued: int = Field(256, ge=0, description="requests that may wait for a place among these sequences")
    queue_timeout_s: Limit = Field(60.0, description="seconds that a request may wait for its place")
    draft_interval_s: Seconds = Field(0.05, description="seconds between drafts, for requests that ask for them")
    image_soft_tokens: SoftTokens = Field(
        0, description="tokens of an image: 70, 140, 280, 560, 1120; 0: what the checkpoint says"
    )
    max_images: int = Field(MAX_IMAGES, ge=0, le=MAX_IMAGES, description="images of a request")
    max_image_bytes: int = Field(20 * 1024**2, ge=1, description="bytes of an image as it is sent")
    max_image_pixels: int = Field(50_000_000, ge=1, le=89_478_485, description="pixels of an image, width times height")
    image_memory_bytes: int = Field(1024**3, ge=1, description="bytes that the images of all requests take together")
    image_threads: int = Field(4, ge=1, description="threads that decode and fetch images")
    fetch_images: bool = Field(False, description="true fetches images from URLs of the internet that clients name")
    fetch_timeout_s: Seconds = Field(5.0, description="seconds that fetching an image may take")
    load_timeout_s: Limit = Field(1800.0, description="seconds that loading the engine may take")
    progress_timeout_s: Limit = Field(120.0, description="seconds that one step may take before the worker is taken for hung")
    max_worker_deaths: int = Field(3, ge=1, description="the model is unloaded after so many deaths of engine workers in a row")
    worker_deaths_window_s: Seconds = Field(600.0, description="seconds; a worker that has served for longer ends such a row")
    close_timeout_s: Seconds = Field(5.0, description="seconds that requests may go on when the model is unloaded")

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> "Settings":
        """From the texts of config.pbtxt. Raises ValueError, one line."""
        try:
            return cls.model_validate(dict(parameters))
        except ValidationError as error:
            raise ValueError("config.pbtxt: " + "; ".join(_line(each) for each in error.errors())) from None

    @classmethod
    def from_model_config(cls, model_config: Mapping[str, Any]) -> "Settings":
        """From the JSON form of config.pbtxt that a server passes on. Names in capitals are the Python backend's own.

        Raises ValueError, one line.
        """
        parameters = model_config.get("parameters", {})
        return cls.from_parameters({name: each["string_value"] for name, each in parameters.items() if not name.isupper()})

    def parameters(self) -> dict[str, str]:
        """The texts of config.pbtxt, in the order above."""
        return {name: _text(value) for name, value in self.model_dump().items()}

    def worker_config(self, model_dir: Path, environment: Mapping[str, str]) -> WorkerConfig:
        """What the engine worker is started with; `model_dir` is the folder of config.pbtxt."""
        return WorkerConfig(
            engine_dir=Path(os.path.realpath(model_dir / self.engine_dir)),
            limits={
                "max_sequences": self.max_sequences or None,
                "max_cached_tokens": self.max_cached_tokens or None,
                "memory_bytes": self.memory_bytes or None,
                "prefix_cache": self.prefix_cache,
                "commit_last": self.commit_last,
                "max_pass_rows": self.max_pass_rows or None,
            },
            environment=dict(environment) | ({"OMP_NUM_THREADS": str(self.cpu_threads)} if self.cpu_threads else {}),
        )

    def image_limits(self) -> ImageLimits:
        return ImageLimits(
            max_images=self.max_images,
            max_bytes=self.max_image_bytes,
            max_pixels=self.max_image_pixels,
            remote=self.fetch_images,
            remote_timeout_s=self.fetch_timeout_s,
        )

    def service_limits(self) -> ServiceLimits:
        return ServiceLimits(
            max_queued=self.max_queued,
            queue_timeout_s=self.queue_timeout_s,
            load_timeout_s=self.load_timeout_s,
            progress_timeout_s=self.progress_timeout_s,
            max_deaths=self.max_worker_deaths,
            deaths_window_s=self.worker_deaths_window_s,
        )


def _text(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _line(error: Mapping[str, Any]) -> str:
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"got the unknown parameter {name}, expected some of {', '.join(Settings.model_fields)}; remove it"
    if error["type"] == "value_error":
        return f"parameter {name}: got {shown(error['input'])}, expected 0 or one of {', '.join(map(str, SOFT_TOKEN_BUDGETS))}"
    return (
        f"parameter {name}: got {shown(error['input'])}, expected {_EXPECTED[Settings.model_fields[name].annotation]}"
        + "".join(
            f" of at {word} {getattr(limit, bound):.10g}"
            for bound, word in (("ge", "least"), ("le", "most"))
            for limit in Settings.model_fields[name].metadata
            if hasattr(limit, bound)
        )
    )


_EXPECTED = {str: "a path", bool: "true or false", int: "a whole number", float: "a number of seconds"}
