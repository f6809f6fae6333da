"""What decoding an image takes at its peak, in a process of its own, is what the pool of images counts for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_checkpoints import TINY

from builder.config import read_model_config

SIDE = 2000
SLACK_BYTES = 8_000_000  # tiles, the patches, Python's own

COMMON = """
import io, json, sys, time
from PIL import Image
from backend.images.decode import decoding_bytes, open_file
from backend.images.limits import ImageLimits
from backend.images.loading import ImageLoader
from backend.images.pool import ImagePool
from contract.model_config import VisionConfig

def memory(key):
    return int(open("/proc/self/status").read().split(key)[1].split()[0]) * 1024

vision, *case = json.loads(sys.argv[1])
loader = ImageLoader(limits=ImageLimits(), vision=VisionConfig(**vision))
"""

ONE_IMAGE = """
kind, size, mode, options = case
exif = Image.Exif()
exif[0x0112] = 6

def file_of(size):
    written = io.BytesIO()
    image = Image.new("RGB", size, (10, 100, 200))
    image.putalpha(77) if mode in ("RGBA", "LA") else None
    image.convert(mode).save(written, kind, **options | ({"exif": exif} if kind != "GIF" else {}))
    return written.getvalue()

loader.load([file_of((8, 8))])  # what is loaded once
data = file_of(size)
before = memory("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
loader.load([data])
print(json.dumps([memory("VmHWM:") - before, decoding_bytes(open_file("image[0]", data, ImageLimits()))]))
"""

POOL = """
[size] = case
written = io.BytesIO()
Image.new("RGBA", size).save(written, "PNG")
counted = decoding_bytes(open_file("image[0]", written.getvalue(), ImageLimits()))
pool, loaded = ImagePool(loader, max_bytes=2 * counted + 100_000, num_threads=4), []
before = memory("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")
for owner in range(4):
    pool.submit(owner, [written.getvalue()], loaded.append)
while len(loaded) < 4:
    time.sleep(0.01)
assert all(isinstance(each, tuple) for each in loaded), loaded
print(json.dumps([memory("VmHWM:") - before, counted]))
"""


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "I;16", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("JPEG", "CMYK", {"progressive": True, "subsampling": 0}),
        ("WEBP", "RGB", {"method": 0}),
        ("WEBP", "RGBA", {"method": 0}),
        ("GIF", "P", {"transparency": 3}),
    ],
)
def test_decoding_takes_no_more_than_is_counted(kind, mode, options):
    peak, counted = measured(ONE_IMAGE, kind, (SIDE, SIDE), mode, options)
    assert SIDE * SIDE < peak < counted + SLACK_BYTES


@pytest.mark.parametrize("size", [(2_000_000, 1), (1, 2_000_000)])
def test_long_and_narrow_images_take_no_more_than_is_counted(size):
    peak, counted = measured(ONE_IMAGE, "PNG", size, "RGBA", {})
    assert 2_000_000 < peak < counted + SLACK_BYTES


def test_four_threads_take_no_more_than_their_pool_may():
    """Also of what was freed: the memory allocator as it is, which keeps some for each thread."""
    peak, counted = measured(POOL, (3000, 3000))
    assert counted / 2 < peak < counted + 4 * SLACK_BYTES


def measured(program: str, *case) -> tuple[int, int]:
    """Bytes: the peak above what was there before, and what is counted."""
    # For one image what was freed shall not be there before.
    changed = {"MALLOC_MMAP_THRESHOLD_": "65536"} if program is ONE_IMAGE else {}
    asked = json.dumps([read_model_config(TINY).vision.model_dump(), *case])
    command, root = [sys.executable, "-c", COMMON + program, asked], Path(__file__).parent.parent
    ran = subprocess.run(command, env=os.environ | changed, cwd=root, capture_output=True, text=True, check=True)
    return tuple(json.loads(ran.stdout))
