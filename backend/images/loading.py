"""The images of one request, as they are given → patches for the engine.

| given as                      | read by                                        |
|-------------------------------|------------------------------------------------|
| text: base64, or a data URL   | `decode_base64`, then `decode`                 |
| text: any other URL           | `fetch`, if the operator allows it; `decode`   |
| bytes: the content of a file  | `decode`                                       |
| a path                        | `decode`; never from a client                  |
| a Pillow image                | `upright_rgb`, with any mode                   |
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from backend.errors import refused
from backend.images.decode import decode, decode_base64, upright_rgb
from backend.images.fetch import fetch
from backend.images.limits import ImageLimits
from backend.images.preprocess import SOFT_TOKEN_BUDGETS, ImagePatches, max_patch_bytes, preprocess
from contract.model_config import VisionConfig

ImageSource = str | bytes | os.PathLike | Image.Image
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ImageLoader:
    """max_soft_tokens: of one image; None: what the checkpoint says. vision: None for an engine that reads text alone.

    Raises ValueError for a number of soft tokens that the family was not trained with.
    """

    limits: ImageLimits
    vision: VisionConfig | None
    max_soft_tokens: int | None = None

    def __post_init__(self):
        if self.max_soft_tokens not in (None, *SOFT_TOKEN_BUDGETS):
            budgets = ", ".join(map(str, SOFT_TOKEN_BUDGETS))
            raise ValueError(f"soft tokens of an image: got {self.max_soft_tokens}, expected one of {budgets}")

    def check(self, sources: Sequence[ImageSource]) -> None:
        """Raises RequestError INVALID_ARGUMENT for what can be refused without a look at any image."""
        if sources and self.vision is None:
            raise refused(f"images: got {len(sources)}, but this engine reads text alone; remove them")
        if len(sources) > self.limits.max_images:
            raise refused(f"images: got {len(sources)}, expected at most {self.limits.max_images} in a request")

    def load(self, sources: Sequence[ImageSource]) -> tuple[ImagePatches, ...]:
        """Raises RequestError INVALID_ARGUMENT, one line that names the image, `image[0]` the first."""
        self.check(sources)
        return tuple(
            preprocess(self._image(f"image[{index}]", source), self._soft_tokens, self.vision)
            for index, source in enumerate(sources)
        )

    def num_bytes(self, sources: Sequence[ImageSource]) -> int:
        """What the sources, URLs with what they may lead to, and their patches take at most."""
        sent = (
            self.limits.max_bytes if is_url(source) else len(source) for source in sources if isinstance(source, str | bytes)
        )
        return sum(sent) + len(sources) * (max_patch_bytes(self._soft_tokens, self.vision) if self.vision else 0)

    @property
    def _soft_tokens(self) -> int:
        """Of one image at most."""
        return self.max_soft_tokens or (self.vision.soft_tokens_per_image if self.vision else 0)

    def _image(self, name: str, source: ImageSource) -> Image.Image:
        if isinstance(source, Image.Image):
            return upright_rgb(name, source, expected="a Pillow image of a whole file")
        if isinstance(source, str):
            data = fetch(name, source, self.limits) if is_url(source) else decode_base64(name, source, self.limits)
        else:
            data = source if isinstance(source, bytes) else _content(name, Path(source))
        return decode(name, data, self.limits)


def is_url(source: ImageSource) -> bool:
    return isinstance(source, str) and _URL.match(source) is not None


def _content(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise refused(f"{name}: {path} cannot be read ({error.strerror}), expected the file of an image") from None
