"""An image file that nobody vouches for → pixels, as transformers' image processor makes them.

1. Its size in bytes. 2. Its header: format, width and height, before anything is decoded; a bomb is refused here. 3. Its
pixels; of an animation the first frame. 4. The orientation of its EXIF data. 5. To RGB: 16 bits a pixel to the upper 8,
transparency onto white, everything else as Pillow converts it.

What is refused raises RequestError INVALID_ARGUMENT, one line.
"""

import base64
import binascii
import io
import struct
import zlib
from typing import NoReturn

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from backend.errors import refused
from backend.images.limits import ImageLimits

# What Pillow's decoders raise for damaged data: each plugin passes on what its own parsing meets.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, OverflowError, AttributeError, struct.error, zlib.error
)  # fmt: skip


def decode(name: str, data: bytes, limits: ImageLimits) -> Image.Image:
    """The RGB image in `data`, a file of one of `limits.formats`; `name` is what messages call it."""
    if len(data) > limits.max_bytes:  # 1.
        _refuse_bytes(name, len(data), limits)
    formats = ", ".join(limits.formats)
    try:
        image = Image.open(io.BytesIO(data), formats=limits.formats)  # 2.
    except Image.DecompressionBombError:
        got = f"more than {2 * Image.MAX_IMAGE_PIXELS} pixels"  # where Pillow stops
        _refuse(f"{name}: got {got}, expected at most {limits.max_pixels}; scale it down")
    except UnidentifiedImageError:
        _refuse(f"{name}: got {len(data)} bytes that are no image, expected a file of one of the formats {formats}")
    except _DAMAGED as error:
        _refuse_damaged(name, error, f"a whole one of the formats {formats}")
    if image.width * image.height > limits.max_pixels:
        _refuse(f"{name}: got {image.width} x {image.height} pixels, expected at most {limits.max_pixels}; scale it down")
    return upright_rgb(name, image, expected=f"a whole one of the formats {formats}")


def upright_rgb(name: str, image: Image.Image, *, expected: str) -> Image.Image:
    """The pixels of an image that Pillow has opened; `expected` is what the message for a damaged one names."""
    try:
        image.load()  # 3.
        return to_rgb(ImageOps.exif_transpose(image))  # 4. and 5.
    except _DAMAGED as error:
        _refuse_damaged(name, error, expected)


def decode_base64(
    name: str, text: str, limits: ImageLimits, *, expected: str = "a file in base64, a data URL or a URL"
) -> bytes:
    """The bytes that `text` stands for: base64, with or without a data URL around it; line breaks are dropped. `expected` is
    what the message for another text names."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            _refuse(f"{name}: got a data URL that is not base64, expected data:image/png;base64,…")
    if len(text) * 3 // 4 > limits.max_bytes + len(text) // 32:  # room for line breaks and padding
        _refuse_bytes(name, len(text) * 3 // 4, limits)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        _refuse(f"{name}: got malformed base64 ({error}), expected {expected}")


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel in one channel, which Pillow would clip at 255
        values, transparent = np.asarray(image), image.info.get("transparency")
        upper = (values >> 8).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(upper if transparent is None else np.where(values == transparent, np.uint8(255), upper))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        opaque = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _refuse_bytes(name: str, num_bytes: int, limits: ImageLimits) -> NoReturn:
    _refuse(f"{name}: got {num_bytes} bytes, expected at most {limits.max_bytes}; scale it down or compress it")


def _refuse_damaged(name: str, error: Exception, expected: str) -> NoReturn:
    reason = " ".join(str(error).split())[:100] or type(error).__name__
    _refuse(f"{name}: got a damaged file ({reason}), expected {expected}")


def _refuse(message: str) -> NoReturn:
    raise refused(message) from None
