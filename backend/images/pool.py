"""Images loaded apart from the thread that takes requests, by a few threads, within a bound on memory.

Decoding takes tens of milliseconds and fetching seconds, and neither may hold up a server's other requests. What images take
in memory is counted from the moment a request is here until it has ended:

| half  | what is counted                                                            | and more than that |
|-------|----------------------------------------------------------------------------|--------------------|
| one   | as they were sent, with the patches that they may become; then the patches | is refused         |
| other | of what is being decoded: its file, its pixels, what its decoder holds     | waits its turn     |

In halves, because what waits to be decoded is held meanwhile: in one sum those that wait could leave no room to any of them.
"""

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from PIL import Image

from backend.errors import RequestError, refused
from backend.images.loading import ImageLoader, ImageSource
from backend.images.preprocess import ImagePatches

_logger = logging.getLogger(__name__)
# glibc gives what is larger than 32 MiB back to the system when it is freed; of Pillow's own blocks, 16 MiB, every thread kept
# those of its largest image: 1.6 GB instead of 0.4 GB after four images of 49 million pixels.
_PIXEL_BLOCK_BYTES = 64 * 1024**2


class ImagePool:
    """Every method may be called from any thread. `owner` names a request from `submit` to `release`."""

    def __init__(self, loader: ImageLoader, *, max_bytes: int, num_threads: int):
        """max_bytes: that the images of all requests may take together, half of it while they are decoded."""
        self._loader, self._half_bytes = loader, max_bytes // 2
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="images")
        self._lock = threading.Lock()
        self._held: dict[Hashable, int] = {}
        self._sources: dict[Hashable, Sequence[ImageSource]] = {}  # not with the threads' work, which outlives a release
        self._turn = threading.Lock()
        self._decoded = threading.Condition()
        self._decoding_bytes = 0
        Image.core.set_block_size(_PIXEL_BLOCK_BYTES)

    def submit(
        self,
        owner: Hashable,
        sources: Sequence[ImageSource],
        on_loaded: Callable[[tuple[ImagePatches, ...] | RequestError], None],
    ) -> None:
        """Has the images loaded; `on_loaded` is called from a thread of the pool, unless the owner is released before.

        Raises:
            RequestError: INVALID_ARGUMENT as `ImageLoader.check` and when they alone take too much memory, UNAVAILABLE when
                they do beside others.
        """
        self._loader.check(sources)
        num_bytes = self._loader.num_bytes(sources)
        if num_bytes > self._half_bytes:
            raise refused(
                f"images: got {num_bytes} bytes, expected at most {self._half_bytes} in all; send fewer or smaller ones"
            )
        with self._lock:
            held = sum(self._held.values())
            if held + num_bytes > self._half_bytes:
                raise RequestError(
                    "UNAVAILABLE",
                    f"images: got {num_bytes} bytes beside {held} of other requests, at most {self._half_bytes} in all; "
                    "try again later",
                )
            self._held[owner], self._sources[owner] = num_bytes, sources
        self._threads.submit(self._load, owner, on_loaded)

    def release(self, owner: Hashable) -> None:
        """The request has ended; nothing happens if it had no images."""
        with self._lock:
            self._held.pop(owner, None)
            self._sources.pop(owner, None)

    def close(self) -> None:
        """What is not begun is dropped without a word."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _load(self, owner: Hashable, on_loaded: Callable) -> None:
        try:
            loaded: tuple[ImagePatches, ...] | RequestError = self._loader.load(_Wanted(self, owner), self._room)
        except _Released:
            return
        except RequestError as error:
            loaded = error
        except Exception:  # a thread of the pool has nobody to tell but the request
            _logger.exception("images could not be loaded")
            loaded = RequestError("INTERNAL", "internal error (see the server's log)")
        with self._lock:
            if owner not in self._held:
                return
            if isinstance(loaded, tuple):
                self._held[owner] = sum(image.patches.nbytes + image.positions.nbytes for image in loaded)
            del self._sources[owner]
        on_loaded(loaded)

    @contextmanager
    def _room(self, name: str, num_bytes: int) -> Iterator[None]:
        """Waits until decoding may take `num_bytes` more, and takes them while the context is open."""
        if num_bytes > self._half_bytes:
            got = f"an image that takes {num_bytes} bytes to decode"
            raise refused(f"{name}: got {got}, expected at most {self._half_bytes}; scale it down")
        with self._turn, self._decoded:  # one waits at a time, so that small images do not overtake a large one for ever
            self._decoded.wait_for(lambda: self._decoding_bytes + num_bytes <= self._half_bytes)
            self._decoding_bytes += num_bytes
        try:
            yield
        finally:
            with self._decoded:
                self._decoding_bytes -= num_bytes
                self._decoded.notify()

    def sources(self, owner: Hashable) -> Sequence[ImageSource]:
        """Those of a request that has not ended. Raises _Released for one that has."""
        with self._lock:
            if owner not in self._sources:
                raise _Released
            return self._sources[owner]


class _Released(Exception):
    """Nobody waits for the images any longer."""


class _Wanted(Sequence):
    """The sources of a request while they are read, image by image: none that is released is read on."""

    def __init__(self, pool: ImagePool, owner: Hashable):
        self._pool, self._owner = pool, owner

    def __len__(self) -> int:
        return len(self._pool.sources(self._owner))

    def __getitem__(self, index):
        return self._pool.sources(self._owner)[index]
