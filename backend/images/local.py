"""The images that a program on this machine gives: what `loading` reads, and texts that name files.

No server may come here: a client's text must never name a file of the server's.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from backend.errors import refused
from backend.images.decode import decode_base64
from backend.images.limits import ImageLimits
from backend.images.loading import ImageSource, is_url

_FORMS = "a Pillow image, an existing file (text or pathlib.Path), the bytes of one, base64 or a data URL"


def local_images(images: Sequence[ImageSource], limits: ImageLimits) -> list[ImageSource]:
    """`images` for `ImageLoader.load`, where a text that names a file is its path.

    Raises RequestError INVALID_ARGUMENT, one line, for what is no list, and for what is no image in any of the forms.
    """
    if isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise refused(f"images: got {type(images).__name__}, expected a list of images; put one alone into a list")
    return [_local(f"image[{index}]", image, limits) for index, image in enumerate(images)]


def _local(name: str, image: ImageSource, limits: ImageLimits) -> ImageSource:
    if not isinstance(image, ImageSource):
        raise refused(f"{name}: got {type(image).__name__}, expected {_FORMS}")
    if not isinstance(image, str) or is_url(image):
        return image
    return Path(image) if os.path.isfile(image) else decode_base64(name, image, limits, expected=_FORMS)
