"""Images loaded apart from the thread that takes requests, by a few threads, within a bound on memory.

Decoding takes tens of milliseconds and fetching seconds, and neither may hold up a server's other requests. What images take
in memory is counted from the moment a request is here until it has ended: first as they were sent, with the patches that they
may become, then as patches.
"""

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

from backend.errors import RequestError, refused
from backend.images.loading import ImageLoader, ImageSource
from backend.images.preprocess import ImagePatches

_logger = logging.getLogger(__name__)


class ImagePool:
    """Every method may be called from any thread. `owner` names a request from `submit` to `release`."""

    def __init__(self, loader: ImageLoader, *, max_bytes: int, num_threads: int):
        """max_bytes: that the images of all requests may take together."""
        self._loader, self._max_bytes = loader, max_bytes
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="images")
        self._lock = threading.Lock()
        self._held: dict[Hashable, int] = {}

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
        if num_bytes > self._max_bytes:
            raise refused(
                f"images: got {num_bytes} bytes, expected at most {self._max_bytes} in all; send fewer or smaller ones"
            )
        with self._lock:
            held = sum(self._held.values())
            if held + num_bytes > self._max_bytes:
                raise RequestError(
                    "UNAVAILABLE",
                    f"images: got {num_bytes} bytes beside {held} of other requests, at most {self._max_bytes} in all; "
                    "try again later",
                )
            self._held[owner] = num_bytes
        self._threads.submit(self._load, owner, sources, on_loaded)

    def release(self, owner: Hashable) -> None:
        """The request has ended; nothing happens if it had no images."""
        with self._lock:
            self._held.pop(owner, None)

    def close(self) -> None:
        """What is not begun is dropped without a word."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _load(self, owner: Hashable, sources: Sequence[ImageSource], on_loaded: Callable) -> None:
        if not self._is_wanted(owner):
            return
        try:
            loaded: tuple[ImagePatches, ...] | RequestError = self._loader.load(sources)
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
        on_loaded(loaded)

    def _is_wanted(self, owner: Hashable) -> bool:
        with self._lock:
            return owner in self._held
