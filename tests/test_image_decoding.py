"""Image files against transformers' own reading, values computed by hand, and files that nobody should decode."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from backend.errors import RequestError
from backend.images.decode import decode_base64, decoding_bytes, open_file, upright_rgb, whole_file
from backend.images.limits import FORMATS, ImageLimits

LIMITS = ImageLimits()
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS[..., :3])


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def png(width: int, height: int, *, depth: int, color: int, data: bytes, **chunks: bytes) -> bytes:
    """A PNG file by its specification. data: the rows, each behind its filter byte. chunks: others, before the data."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    listed = {"IHDR": header, **chunks, "IDAT": zlib.compress(data), "IEND": b""}
    parts = [
        struct.pack(">I", len(content)) + name.encode() + content + struct.pack(">I", zlib.crc32(name.encode() + content))
        for name, content in listed.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def decode(name: str, data: bytes, limits: ImageLimits) -> Image.Image:
    return upright_rgb(name, open_file(name, data, limits), expected=whole_file(limits), in_place=True)


def decoded(data: bytes, limits: ImageLimits = LIMITS) -> np.ndarray:
    image = decode("image[0]", data, limits)
    assert image.mode == "RGB"
    return np.asarray(image)


FILES = {
    "PNG": file_of(PICTURE),
    "JPEG": file_of(PICTURE, "JPEG"),
    "WebP": file_of(PICTURE, "WEBP"),
    "GIF": file_of(PICTURE, "GIF"),
    "animated GIF": file_of(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(180), PICTURE.rotate(90)]),
    "animated WebP": file_of(PICTURE, "WEBP", save_all=True, append_images=[PICTURE.rotate(180)]),
    "gray PNG": file_of(PICTURE.convert("L")),
    "gray JPEG": file_of(PICTURE.convert("L"), "JPEG"),
    "black and white PNG": file_of(PICTURE.convert("1")),
    "palette PNG": file_of(PICTURE.quantize(8)),
    "CMYK JPEG": file_of(PICTURE.convert("CMYK"), "JPEG"),
    "RGBA PNG": file_of(Image.fromarray(PIXELS)),
    "RGBA WebP": file_of(Image.fromarray(PIXELS), "WEBP", lossless=True),
    "gray PNG with alpha": file_of(Image.fromarray(PIXELS).convert("LA")),
    "palette PNG with a transparent color": file_of(PICTURE.quantize(8), transparency=3),
    "RGB PNG with a transparent color": file_of(PICTURE, transparency=tuple(PIXELS[2, 2, :3].tolist())),
    "GIF with a transparent color": file_of(PICTURE.quantize(8), "GIF", transparency=3),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_read_as_transformers_reads_it(kind):
    expected = convert_to_rgb(Image.open(io.BytesIO(FILES[kind])), return_numpy=True)
    np.testing.assert_array_equal(decoded(FILES[kind]), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_of_exif_data(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(PICTURE, kind, exif=exif)
    (tmp_path / "file").write_bytes(data)
    image = decoded(data)
    np.testing.assert_array_equal(image, np.asarray(load_image(str(tmp_path / "file"))))
    assert image.shape == ((7, 5, 3) if orientation >= 5 else (5, 7, 3))


@pytest.mark.parametrize("kind", ["black and white PNG", "CMYK JPEG", "RGBA PNG", "palette PNG with a transparent color"])
def test_an_image_of_several_tiles(kind):
    """Of which the last ones are not whole."""
    small = Image.open(io.BytesIO(FILES[kind]))
    data = file_of(small.resize((1030, 517)), small.format)
    np.testing.assert_array_equal(decoded(data), convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True))


def test_transparency_lies_on_white():
    clear, half, opaque = (10, 20, 30, 0), (0, 100, 200, 128), (10, 20, 30, 255)
    image = Image.fromarray(np.array([[clear, half, opaque]], np.uint8))
    # 128 / 255 of the color and 127 / 255 of white
    assert decoded(file_of(image)).tolist() == [[[255, 255, 255], [127, 177, 227], [10, 20, 30]]]


def test_sixteen_bits_become_the_upper_eight():
    values = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
    expected = [[0, 0, 1, 0x12, 0xFF]]
    gray = decoded(file_of(Image.fromarray(values)))
    assert gray.tolist() == [[[value] * 3 for value in row] for row in expected]
    row = struct.pack(">3H", 0x1234, 0x00FF, 0xFF00) + struct.pack(">3H", 0, 0x0100, 0xFFFF)
    color = decoded(png(2, 1, depth=16, color=2, data=b"\0" + row))
    assert color.tolist() == [[[0x12, 0x00, 0xFF], [0, 1, 0xFF]]]


def test_a_transparent_value_of_sixteen_bits_is_white():
    row = struct.pack(">3H", 0x1234, 0x1235, 0x1234)
    image = decoded(png(3, 1, depth=16, color=0, data=b"\0" + row, tRNS=struct.pack(">H", 0x1234)))
    assert image[0, :, 0].tolist() == [255, 0x12, 255]


def test_of_a_jpeg_with_further_pictures_the_first_is_read():
    """As many cameras write them; Pillow calls them MPO."""
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green")]
    data = file_of(frames[0], "MPO", save_all=True, append_images=frames[1:])
    image = open_file("image[0]", data, LIMITS)
    assert image.format == "MPO" and decoding_bytes(image) > 10 * 16 * 16
    assert (abs(decoded(data).astype(int) - (255, 0, 0)) < 3).all()


def test_of_an_animation_the_first_frame_is_read():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP"):
        data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert (decoded(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "DATA:;charset=x;BASE64,"])
def test_base64_with_and_without_a_data_url(prefix):
    text = base64.b64encode(FILES["PNG"]).decode()
    assert decode_base64("image[0]", prefix + text, LIMITS) == FILES["PNG"]
    assert (
        decode_base64("image[0]", prefix + "\n".join(text[i : i + 76] for i in range(0, len(text), 76)), LIMITS) == FILES["PNG"]
    )


BOMB = png(50_000, 50_000, depth=8, color=2, data=b"")
BAD_FILES = {
    "nothing": (b"", ["0 bytes", "no image", "PNG, JPEG, WEBP, GIF"]),
    "a text": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ["no image", "PNG, JPEG, WEBP, GIF"]),
    "another format": (file_of(PICTURE, "BMP"), ["no image", "PNG, JPEG, WEBP, GIF"]),
    "a bomb": (BOMB, ["pixels", "at most 50000000"]),
    "a large image": (png(8000, 8000, depth=8, color=2, data=b""), ["8000 x 8000 pixels", "at most 50000000"]),
    "a large file": (b"\x89PNG" + bytes(LIMITS.max_bytes), [f"{LIMITS.max_bytes + 4} bytes", f"at most {LIMITS.max_bytes}"]),
} | {
    f"a truncated {kind}": (FILES[kind][: len(FILES[kind]) // 2], ["image[0]", "PNG, JPEG, WEBP, GIF"])
    for kind in ("PNG", "JPEG", "WebP", "GIF")
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(case):
    data, words = BAD_FILES[case]
    with pytest.raises(RequestError) as caught:
        decode("image[0]", data, LIMITS)
    assert_one_line(caught.value, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data:image/png,abc", ["data URL that is not base64", "data:image/png;base64"]),
        ("data:image/png;base64", ["data URL that is not base64"]),
        ("no base64!", ["malformed base64", "a data URL or a URL"]),
        ("abc", ["malformed base64"]),
        ("ü" * 8, ["malformed base64"]),
        ("A" * (LIMITS.max_bytes * 3 // 2), [f"at most {LIMITS.max_bytes}"]),
    ],
)
def test_bad_base64_is_refused_in_one_line(text, words):
    with pytest.raises(RequestError) as caught:
        decode_base64("image[0]", text, LIMITS)
    assert_one_line(caught.value, words)


def test_the_limits_are_those_of_the_record():
    limits = ImageLimits(max_bytes=len(FILES["PNG"]), max_pixels=35, formats=("PNG",))
    assert decoded(FILES["PNG"], limits).shape == (5, 7, 3)
    for changed, words in (
        (ImageLimits(max_bytes=len(FILES["PNG"]) - 1), ["bytes", f"at most {len(FILES['PNG']) - 1}"]),
        (ImageLimits(max_pixels=34), ["7 x 5 pixels", "at most 34"]),
        (ImageLimits(formats=("JPEG", "GIF")), ["no image", "JPEG, GIF"]),
    ):
        with pytest.raises(RequestError) as caught:
            decode("image[0]", FILES["PNG"], changed)
        assert_one_line(caught.value, words)


def test_more_pixels_than_pillow_takes_calmly_cannot_be_allowed():
    with pytest.raises(ValueError, match="max_pixels: got 100000000, expected 1 to 89478485"):
        ImageLimits(max_pixels=100_000_000)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_whatever_is_damaged_is_an_image_or_refused(kind, data):
    """Bytes changed, dropped or cut off: never another exception."""
    damaged = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    del damaged[data.draw(st.integers(1, len(damaged))) :]
    try:
        image = decode("image[0]", bytes(damaged), LIMITS)
    except RequestError as error:
        assert_one_line(error, ["image[0]"])
    else:
        assert image.mode == "RGB" and image.width * image.height <= LIMITS.max_pixels


def assert_one_line(error: RequestError, words: list[str]) -> None:
    message = str(error)
    assert error.code == "INVALID_ARGUMENT"
    assert message.startswith("image[0]: ") and "\n" not in message and len(message) < 300
    assert [word for word in words if word not in message] == []


def test_the_formats_are_those_that_pillow_can_read():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)
