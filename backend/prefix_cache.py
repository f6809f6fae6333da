"""The prefix cache's rules: what names a page of keys and values, and how much of a prompt the named pages can stand for.

A page's keys and values depend on every token up to its end and on nothing else, so its key is a chained hash: of the key of
the page before it, its own token ids, and the images in it. Equal keys mean equal content, whichever request computed it. Only
full pages have keys; they are never written again, so requests share them and nothing is ever copied.

A prefix of n pages can be used if everything is there that a token behind it can see:

- full-attention layers: the pages 0 to n - 1;
- sliding layers: the pages that hold the last window - 1 tokens before it. Older ones may be gone;
- and no image spans the end, for the rest of it would have to be seen by what is cached.
"""

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from backend.page_pool import PagePool
from contract.model_config import LayerType


class ImageSpan(NamedTuple):
    """The tokens `start` to `end` (exclusive) of a prompt are one image; `key` tells images apart (a hash of its pixels)."""

    start: int
    end: int
    key: bytes


def extend_page_keys(keys: list[bytes], token_ids: Sequence[int], page_size: int, images: Iterable[ImageSpan] = ()) -> None:
    """Appends the keys of the full pages of `token_ids` that `keys` does not have yet, 16 bytes each."""
    for page in range(len(keys), len(token_ids) // page_size):
        start, end = page * page_size, (page + 1) * page_size
        content = hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)
        content.update(array("i", token_ids[start:end]).tobytes())
        for image in images:
            if image.start < end and image.end > start:
                content.update(array("q", (image.start, image.end, len(image.key))).tobytes() + image.key)
        keys.append(content.digest())


def usable_pages(
    keys: Sequence[bytes],
    pools: Mapping[LayerType, PagePool],
    kept_tokens: Mapping[LayerType, int | None],
    page_size: int,
    images: Iterable[ImageSpan] = (),
    multiple: int = 1,
) -> int:
    """The most pages of the prefix `keys` that can be used (see the module docstring), a multiple of `multiple`.

    kept_tokens: how many tokens before it a token sees in each layer type; None sees all.

    1. Full-attention layers bound the prefix. 2. From there down: where a window misses a page, no prefix that sees this page
    can be used, so the next one ends before it; the last page that is missing says where. So of thousands of pages each is
    looked up about once. 3. Where an image spans the end, the next one ends before the image.
    """
    full = [pools[kind] for kind, kept in kept_tokens.items() if kept is None]
    windows = [(pools[kind], kept) for kind, kept in kept_tokens.items() if kept is not None]
    end = len(keys)
    for pool in full:  # 1.
        end = next((page for page in range(end) if pool.find(keys[page]) is None), end)
    end -= end % multiple
    while end:
        below = end
        for pool, kept in windows:  # 2.
            seen = range(max(0, end * page_size - kept) // page_size, end)
            below = min(below, next((page for page in reversed(seen) if pool.find(keys[page]) is None), end))
        for image in images:  # 3.
            if image.start < end * page_size < image.end:
                below = min(below, image.start // page_size)
        if below == end:
            break
        end = below - below % multiple
    return end
