"""What a checkpoint says of the way from an image to the vision tower: an image's soft tokens, and what must be as it is here.

That way is the backend's (`backend.images`), which knows one: that of transformers' `Gemma4ImageProcessor` as the family has
it. transformers reads it from the first of these that is there, and not from config.json:

    processor_config.json       its "image_processor"
    preprocessor_config.json    all of it
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from builder.errors import BuildError
from builder.fields import SOFT_TOKENS, Fields
from contract.model_config import VisionConfig
from contract.problems import printable
from contract.regular_file import regular

_TYPE = "Gemma4ImageProcessor"
_SOFT_TOKENS = 280  # what transformers takes where its file does not say
_BICUBIC = 3  # Pillow's number
_WHY = "images are not made ready otherwise"


def read_soft_tokens(checkpoint: Path, vision: VisionConfig) -> int:
    """Soft tokens of an image at most, where a request does not say; those of `vision`, if no file says.

    Keys that change nothing are disregarded: every release of transformers writes others.

    Raises:
        BuildError: a file cannot be read, or one line for each key that asks for what is not done here.
    """
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        path = checkpoint / name
        values = _read(path)
        if values is not None and key:
            values = values.get(key)
        if values is not None:
            problems: list[str] = []
            soft_tokens = _checked(values, f"{key}." if key else "", vision, problems)
            if problems:
                raise BuildError("\n".join(f"{path}: {printable(problem)}" for problem in problems))
            return soft_tokens
    return vision.soft_tokens_per_image


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is no file."""
    if not os.path.lexists(path):
        return None
    try:
        values = json.loads(regular(path).read_text())
    except OSError as error:
        raise BuildError(f"{path}: cannot be read ({error}); give access to it, or replace it") from None
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise BuildError(f"{path}: got a JSON {type(values).__name__}, expected an object")
    return values


def _checked(values: object, where: str, vision: VisionConfig, problems: list[str]) -> int:
    if not isinstance(values, dict):
        problems.append(f"{where.rstrip('.')}: got a JSON {type(values).__name__}, expected an object")
        return vision.soft_tokens_per_image
    fields = Fields({key: value for key, value in values.items() if value is not None}, where, problems)
    kind = fields.take("image_processor_type", _TYPE)
    if not str(kind).startswith(_TYPE):  # there are variants of it, for other libraries
        problems.append(f"{where}image_processor_type: got {kind!r}, expected {_TYPE}; {_WHY}")
    for key in ("do_convert_rgb", "do_resize", "do_rescale"):
        fields.take_fixed(key, True, _WHY)
    fields.take_fixed("resample", _BICUBIC, _WHY)
    for key in ("patch_size", "pooling_kernel_size"):
        fields.take_fixed(key, getattr(vision, key), "config.json says so of the vision tower")
    scale = fields.take("rescale_factor", 1 / 255)
    if not isinstance(scale, float) or not math.isclose(scale, 1 / 255, rel_tol=1e-6):
        problems.append(f"{where}rescale_factor: got {scale!r}, expected 1 / 255; {_WHY}")
    mean, deviation = fields.take("image_mean", [0.0] * 3), fields.take("image_std", [1.0] * 3)
    if (mean, deviation) != ([0.0] * 3, [1.0] * 3):  # else it changes nothing
        fields.take_fixed("do_normalize", False, _WHY)
    return fields.take_a(SOFT_TOKENS, "max_soft_tokens", _SOFT_TOKENS)
