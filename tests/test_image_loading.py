"""The images of a request, however they are given, and the threads and the memory that loading them takes."""

import base64
import io
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_checkpoints import TINY
from waiting import wait_until

from backend.errors import RequestError
from backend.images.decode import open_file
from backend.images.limits import ImageLimits
from backend.images.loading import ImageLoader
from backend.images.local import local_images
from backend.images.pool import ImagePool
from backend.images.preprocess import max_patch_bytes, preprocess
from builder.config import read_model_config

VISION = read_model_config(TINY).vision
LOADER = ImageLoader(limits=ImageLimits(), vision=VISION, max_soft_tokens=70)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def png() -> bytes:
    written = io.BytesIO()
    PICTURE.save(written, "PNG")
    return written.getvalue()


PNG = png()
BASE64 = base64.b64encode(PNG).decode()


def in_a_file(tmp_path: Path) -> Path:
    (tmp_path / "picture.png").write_bytes(PNG)
    return tmp_path / "picture.png"


@pytest.mark.parametrize(
    "given",
    [
        lambda _: BASE64,
        lambda _: f"data:image/png;base64,{BASE64}",
        lambda _: PNG,
        in_a_file,
        lambda _: PICTURE,
        lambda _: PICTURE.convert("RGBA"),
    ],
    ids=["base64", "data URL", "bytes", "path", "picture", "picture of another mode"],
)
def test_every_form_gives_the_same_patches(given, tmp_path):
    expected = preprocess(PICTURE, 70, VISION)
    [loaded] = LOADER.load([given(tmp_path)])
    assert loaded.digest == expected.digest
    np.testing.assert_array_equal(loaded.patches, expected.patches)


def test_the_checkpoint_says_how_many_soft_tokens_unless_the_operator_does():
    vision = VISION.model_copy(update={"soft_tokens_per_image": 140})
    for own, budget in ((None, 140), (70, 70), (280, 280)):
        [loaded] = replace(LOADER, vision=vision, max_soft_tokens=own).load([PNG])
        assert loaded.digest == preprocess(PICTURE, budget, vision).digest


@pytest.mark.parametrize(
    ("loader", "sources", "words"),
    [
        (LOADER, [PNG] * 8, "images: got 8, expected at most 7 in a request"),
        (replace(LOADER, limits=ImageLimits(max_images=1)), [PNG] * 2, "images: got 2, expected at most 1 in a request"),
        (replace(LOADER, vision=None), [PNG], "images: got 1, but this engine reads text alone; remove them"),
    ],
)
def test_what_is_refused_before_any_image_is_looked_at(loader, sources, words):
    for call in (loader.check, loader.load):
        with pytest.raises(RequestError) as caught:
            call(sources)
        assert (caught.value.code, str(caught.value)) == ("INVALID_ARGUMENT", words)


def test_the_bad_one_of_several_images_is_named():
    with pytest.raises(RequestError, match=r"^image\[1\]: got 3 bytes that are no image"):
        LOADER.load([PNG, b"bad", b"worse"])


def test_urls_are_the_operators_to_allow():
    for url in ("http://example.com/a.png", "HTTPS://example.com/a.png", "file:///etc/passwd"):
        with pytest.raises(RequestError, match=r"^image\[0\]: got a URL, but this server fetches none"):
            LOADER.load([url])


def test_a_text_never_names_a_file_of_the_server(tmp_path):
    with pytest.raises(RequestError, match=r"^image\[0\]: got malformed base64"):
        LOADER.load([str(in_a_file(tmp_path))])


def test_every_form_that_a_program_may_give(tmp_path):
    path = in_a_file(tmp_path)
    given = [PICTURE, path, str(path), PNG, BASE64, f"data:image/png;base64,{BASE64}"]
    loaded = LOADER.load(local_images(given, ImageLimits()))
    assert {image.digest for image in loaded} == {preprocess(PICTURE, 70, VISION).digest}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_of_an_opened_file_is_turned_as_the_file_is(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    written = io.BytesIO()
    PICTURE.save(written, "PNG", exif=exif)
    opened, data = LOADER.load([Image.open(written), written.getvalue()])
    assert opened.digest == data.digest


def test_a_picture_of_a_file_that_is_cut_off_is_refused_in_one_line():
    with pytest.raises(RequestError) as caught:
        LOADER.load([PNG, Image.open(io.BytesIO(PNG[: len(PNG) // 2]))])
    assert str(caught.value) == (
        "image[1]: got a damaged file (image file is truncated), expected a Pillow image of a whole file"
    )


def test_a_number_of_soft_tokens_that_there_is_not():
    with pytest.raises(ValueError, match="soft tokens of an image: got 71, expected one of 70, 140, 280, 560, 1120"):
        replace(LOADER, max_soft_tokens=71)


SIZE = len(PNG) + max_patch_bytes(70, VISION)


def test_patches_take_no_more_than_is_counted():
    for size in ((48, 48), (30, 40), (1, 60), (500, 3), (333, 334)):
        image = preprocess(Image.new("RGB", size), 70, VISION)
        assert image.patches.nbytes + image.positions.nbytes <= max_patch_bytes(70, VISION)
    assert replace(LOADER, max_soft_tokens=70).num_bytes([PNG, PNG]) == 2 * SIZE


class HeldLoader(ImageLoader):
    """Loads when it may."""

    gate = None

    def load(self, sources, *reserve):
        assert self.gate.wait(30)
        return super().load(sources, *reserve)


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    event = threading.Event()
    monkeypatch.setattr(HeldLoader, "gate", event)
    yield event
    event.set()


@pytest.fixture
def held(gate):
    """A pool of one thread that begins when `gate` is set, for two images with their patches, and as much for decoding."""
    loader = HeldLoader(limits=ImageLimits(), vision=VISION, max_soft_tokens=70)
    pool = ImagePool(loader, max_bytes=4 * SIZE, num_threads=1)
    yield pool
    gate.set()
    pool.close()


def test_images_are_loaded_in_the_background(held, gate):
    arrived = []
    held.submit("a", [PNG], arrived.append)
    assert arrived == []
    gate.set()
    wait_until(lambda: arrived)
    assert [image.digest for image in arrived[0]] == [preprocess(PICTURE, 70, VISION).digest]


def test_what_is_wrong_with_an_image_comes_the_same_way(held, gate):
    arrived = []
    held.submit("a", [b"bad"], arrived.append)
    gate.set()
    wait_until(lambda: arrived)
    assert isinstance(arrived[0], RequestError) and "no image" in str(arrived[0])
    with pytest.raises(RequestError, match="at most 7"):
        held.submit("b", [PNG] * 8, arrived.append)


def test_what_is_released_is_not_kept_and_not_read_on(held, gate):
    """Neither what waits for a thread nor further images of what has one."""

    class Text(str):
        """base64 that can be watched."""

    opened, arrived = [], []
    waiting = Text(BASE64)
    kept = weakref.ref(waiting)
    held.submit("b", [waiting], arrived.append)
    del waiting
    held.release("b")
    assert kept() is None
    held.submit("a", [PNG, PNG], arrived.append)

    def released(name, *others):
        opened.append(name)
        held.release("a")
        return open_file(name, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backend.images.loading.open_file", released)
        gate.set()
        wait_until(lambda: opened)
        held._threads.shutdown(wait=True)
    assert (opened, arrived) == (["image[0]"], [])


def test_memory_is_bounded_until_requests_end(held, gate):
    arrived = []
    held.submit("a", [PNG], arrived.append)
    held.submit("b", [PNG], arrived.append)
    with pytest.raises(RequestError) as caught:
        held.submit("c", [PNG], arrived.append)
    assert caught.value.code == "UNAVAILABLE"
    assert (
        str(caught.value)
        == f"images: got {SIZE} bytes beside {2 * SIZE} of other requests, at most {2 * SIZE} in all; try again later"
    )
    held.release("b")
    held.submit("c", [PNG], arrived.append)
    gate.set()
    wait_until(lambda: len(arrived) == 2)  # a and c: what was released before its turn is not loaded
    with pytest.raises(RequestError, match="beside"):  # patches count as long as they are there
        held.submit("d", [PNG], arrived.append)
    for owner in ("a", "c", "never there"):
        held.release(owner)
    held.submit("d", [PNG], arrived.append)
    wait_until(lambda: len(arrived) == 3)


def test_images_that_never_fit_are_not_asked_for_again(held):
    with pytest.raises(RequestError) as caught:
        held.submit("a", [PNG] * 3, lambda _: None)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert str(caught.value) == f"images: got {3 * SIZE} bytes, expected at most {2 * SIZE} in all; send fewer or smaller ones"


def test_an_image_that_takes_too_much_to_decode_is_refused(held, gate):
    written = io.BytesIO()
    Image.new("RGBA", (500, 400)).save(written, "PNG")
    num_bytes = len(written.getvalue()) + 500 * 400 * 8 + 900 * 40
    assert num_bytes > 2 * SIZE
    arrived = []
    held.submit("a", [PNG, written.getvalue()], arrived.append)
    gate.set()
    wait_until(lambda: arrived)
    assert str(arrived[0]) == (
        f"image[1]: got an image that takes {num_bytes} bytes to decode, expected at most {2 * SIZE}; scale it down"
    )


class DecodingLoader(ImageLoader):
    """Takes all the memory that there is for decoding, and notes whether another thread has it too."""

    taken = threading.Lock()
    is_taken_twice = False

    def load(self, sources, reserve):
        with reserve("image[0]", 2 * SIZE):
            if not self.taken.acquire(blocking=False):
                DecodingLoader.is_taken_twice = True
                return ()
            time.sleep(0.02)  # for another thread, which must not come here
            self.taken.release()
        return super().load(sources)


def test_images_wait_for_the_memory_that_decoding_takes():
    pool = ImagePool(DecodingLoader(limits=ImageLimits(), vision=VISION, max_soft_tokens=70), max_bytes=4 * SIZE, num_threads=2)
    arrived = []
    pool.submit("a", [PNG], arrived.append)
    pool.submit("b", [PNG], arrived.append)
    wait_until(lambda: len(arrived) == 2)
    assert all(len(loaded) == 1 for loaded in arrived) and not DecodingLoader.is_taken_twice
    pool.close()


def test_an_unexpected_failure_says_nothing_of_itself(held, gate, monkeypatch):
    monkeypatch.setattr(HeldLoader, "load", lambda *_: {}["/a/path"])
    arrived = []
    held.submit("a", [PNG], arrived.append)
    wait_until(lambda: arrived)
    assert (arrived[0].code, str(arrived[0])) == ("INTERNAL", "internal error (see the server's log)")
