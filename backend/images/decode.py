"""An image file that nobody vouches for → pixels, as transformers' image processor makes them.

1. Its size in bytes. 2. Its header: format, width and height, before anything is decoded; a bomb is refused here. 3. Its
pixels; of an animation the first frame. 4. The orientation of its EXIF data. 5. To RGB: 16 bits a pixel to the upper 8,
transparency onto white, everything else as Pillow converts it.

What is refused raises RequestError INVALID_ARGUMENT, one line.
"""

import base64
import binascii
import io
import itertools
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from backend.errors import RequestError, refused
from backend.images.limits import ImageLimits

# What Pillow's decoders raise for damaged data: each plugin passes on what its own parsing meets.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, OverflowError, AttributeError, struct.error, zlib.error
)  # fmt: skip
# The peak from 3. to 5. and of scaling after it, measured with Pillow 12.3: the pixels twice, 4 bytes each; of a JPEG in
# several scans once, with 2 bytes a color; of a WebP four times, for its decoder keeps two frames and gives a third.
_BYTES_PER_PIXEL = {"PNG": 8, "JPEG": 10, "MPO": 10, "WEBP": 16, "GIF": 8}  # MPO: a JPEG with further pictures in it
_BYTES_PER_CMYK_PIXEL = 12
_BYTES_PER_LINE = 40  # and column: weights of bicubic scaling, rows of PNG; more than the pixels of a long and narrow image
_TILE = 512


def open_file(name: str, data: bytes, limits: ImageLimits) -> Image.Image:
    """The image in `data`, a file of one of `limits.formats`, of which the header alone is read; `name` is what messages call
    it."""
    if len(data) > limits.max_bytes:  # 1.
        raise _too_large(name, len(data), limits)
    formats = ", ".join(limits.formats)
    try:
        image = Image.open(io.BytesIO(data), formats=limits.formats)  # 2.
    except Image.DecompressionBombError:
        got = f"more than {2 * Image.MAX_IMAGE_PIXELS} pixels"  # where Pillow stops
        raise refused(f"{name}: got {got}, expected at most {limits.max_pixels}; scale it down") from None
    except UnidentifiedImageError:
        got = f"{len(data)} bytes that are no image"
        raise refused(f"{name}: got {got}, expected a file of one of the formats {formats}") from None
    except _DAMAGED as error:
        raise _damaged(name, error, whole_file(limits)) from None
    if image.width * image.height > limits.max_pixels:
        got = f"{image.width} x {image.height} pixels"
        raise refused(f"{name}: got {got}, expected at most {limits.max_pixels}; scale it down")
    return image


def decoding_bytes(image: Image.Image) -> int:
    """What `upright_rgb` in place and `preprocess` take at most at once for what `open_file` gave, beside the file and the
    patches."""
    per_pixel = _BYTES_PER_CMYK_PIXEL if image.mode == "CMYK" else _BYTES_PER_PIXEL[image.format]
    return image.width * image.height * per_pixel + (image.width + image.height) * _BYTES_PER_LINE


def upright_rgb(name: str, image: Image.Image, *, expected: str, in_place: bool = False) -> Image.Image:
    """The pixels of an image that Pillow has opened; `expected` is what the message for a damaged one names. in_place: `image`
    itself is turned, which saves a copy of its pixels."""
    try:
        image.load()  # 3.
        if in_place:
            ImageOps.exif_transpose(image, in_place=True)  # 4.
        else:
            image = ImageOps.exif_transpose(image)
        return to_rgb(image)  # 5.
    except _DAMAGED as error:
        raise _damaged(name, error, expected) from None


def whole_file(limits: ImageLimits) -> str:
    """What messages say that a damaged file should be."""
    return f"a whole one of the formats {', '.join(limits.formats)}"


def decode_base64(
    name: str, text: str, limits: ImageLimits, *, expected: str = "a file in base64, a data URL or a URL"
) -> bytes:
    """The bytes that `text` stands for: base64, with or without a data URL around it; line breaks are dropped. `expected` is
    what the message for another text names."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise refused(f"{name}: got a data URL that is not base64, expected data:image/png;base64,…")
    if len(text) * 3 // 4 > limits.max_bytes + len(text) // 32:  # room for line breaks and padding
        raise _too_large(name, len(text) * 3 // 4, limits)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise refused(f"{name}: got malformed base64 ({error}), expected {expected}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` itself if it is RGB. Otherwise made in tiles, so that no step has all pixels a third time."""
    if image.mode == "RGB" and not _is_transparent(image):
        return image
    rgb = Image.new("RGB", image.size)
    for left, top in itertools.product(range(0, image.width, _TILE), range(0, image.height, _TILE)):
        box = (left, top, min(left + _TILE, image.width), min(top + _TILE, image.height))
        rgb.paste(_tile_to_rgb(image.crop(box)), box)
    return rgb


def _tile_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel in one channel, which Pillow would clip at 255
        values, transparent = np.asarray(image), image.info.get("transparency")
        upper = (values >> 8).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(upper if transparent is None else np.where(values == transparent, np.uint8(255), upper))
    if _is_transparent(image):
        opaque = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _is_transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or image.info.get("transparency") is not None


def _too_large(name: str, num_bytes: int, limits: ImageLimits) -> RequestError:
    return refused(f"{name}: got {num_bytes} bytes, expected at most {limits.max_bytes}; scale it down or compress it")


def _damaged(name: str, error: Exception, expected: str) -> RequestError:
    reason = " ".join(str(error).split())[:100] or type(error).__name__
    return refused(f"{name}: got a damaged file ({reason}), expected {expected}")
