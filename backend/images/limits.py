"""What an image that a client sends may be: one record, checked when it is made."""

from dataclasses import dataclass

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""Pillow's names of the formats that are read; of its other decoders none sees a client's bytes."""

MAX_IMAGES = 7
"""Of one prompt: what the family was made for."""


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """max_images: of one request. max_bytes: of one image as it is sent, before it is decoded. max_pixels: of one image, width
    times height. remote: whether URLs are fetched that a client names. remote_timeout_s: for one of them, from its name to its
    last byte. max_redirects: that one may make.

    Raises ValueError for more pixels than Pillow decodes without a warning.
    """

    max_images: int = MAX_IMAGES
    max_bytes: int = 20 * 1024**2
    max_pixels: int = 50_000_000
    formats: tuple[str, ...] = FORMATS
    remote: bool = False
    remote_timeout_s: float = 5.0
    max_redirects: int = 3

    def __post_init__(self):
        if not 1 <= self.max_pixels <= Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"max_pixels: got {self.max_pixels}, expected 1 to {Image.MAX_IMAGE_PIXELS}")
