"""The images of one request, as they are given → patches for the engine.

| given as                      | read by                                        |
|-------------------------------|------------------------------------------------|
| text: base64, or a data URL   | `decode_base64`, then as a file                |
| text: any other URL           | `fetch`, if the operator allows it; as a file  |
| bytes: the content of a file  | `open_file`, then `upright_rgb`                |
| a path                        | as a file; never from a client                 |
| a Pillow image                | `upright_rgb`, with any mode                   |
"""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from backend.errors import refused
from backend.images.decode import decode_base64, decoding_bytes, open_file, upright_rgb, whole_file
from backend.images.fetch import fetch
from backend.images.limits import ImageLimits
from backend.images.preprocess import SOFT_TOKEN_BUDGETS, ImagePatches, max_patch_bytes, preprocess
from contract.model_config import VisionConfig
from contract.problems import printable
from contract.regular_file import regular

ImageSource = str | bytes | os.PathLike | Image.Image
Reserve = Callable[[str, int], AbstractContextManager]
"""Called with an image's name and the bytes that decoding it takes; they are taken while the context is open."""
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

    def load(
        self, sources: Sequence[ImageSource], reserve: Reserve = lambda name, num_bytes: nullcontext()
    ) -> tuple[ImagePatches, ...]:
        """One after the other. Raises RequestError INVALID_ARGUMENT, one line that names the image, `image[0]` the first."""
        self.check(sources)
        return tuple(self._patches(f"image[{index}]", source, reserve) for index, source in enumerate(sources))

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

    def _patches(self, name: str, source: ImageSource, reserve: Reserve) -> ImagePatches:
        if isinstance(source, Image.Image):
            picture = upright_rgb(name, source, expected="a Pillow image of a whole file")
            return preprocess(picture, self._soft_tokens, self.vision)
        data = self._file(name, source)
        image = open_file(name, data, self.limits)
        with reserve(name, len(data) + decoding_bytes(image)):
            # The same name for both, so that what the decoder holds is gone before the pixels are scaled.
            image = upright_rgb(name, image, expected=whole_file(self.limits), in_place=True)
            patches = preprocess(image, self._soft_tokens, self.vision)
            del image  # before its memory is another one's
        return patches

    def _file(self, name: str, source: str | bytes | os.PathLike) -> bytes:
        if isinstance(source, str):
            return fetch(name, source, self.limits) if is_url(source) else decode_base64(name, source, self.limits)
        return source if isinstance(source, bytes) else _content(name, Path(source))


def is_url(source: ImageSource) -> bool:
    return isinstance(source, str) and _URL.match(source) is not None


def _content(name: str, path: Path) -> bytes:
    try:
        return regular(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no file's name has a character 0
        reason = getattr(error, "strerror", None) or error
        raise refused(f"{name}: {printable(str(path))} cannot be read ({reason}), expected the file of an image") from None
