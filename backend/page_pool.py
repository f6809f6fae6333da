"""The page numbers of one layer type: free, held by sequences, or held by none and kept for the prefix cache.

    take ──▶ held (1 reference) ──share──▶ more references ──release──▶ … the last one gone:
        without a name ──▶ free
        with a name    ──▶ kept, until `share` finds it or `take` needs it (least recently released first)

A page's name is the key of its content (`prefix_cache`). A named page is full and never written again.

Sequences are promised pages when they are admitted; `num_available` is what further ones can be promised, so `take` on a
promise never fails.
"""

from collections import OrderedDict


class PagePool:
    """Page numbers 0 to num_pages - 1.

    `gives_up`: sequences of this layer type give pages up while they run, and are promised a new one each time. A page that
    several sequences hold then counts as often as it is held, for the one that gives it up frees nothing.
    """

    def __init__(self, num_pages: int, *, gives_up: bool):
        self.num_pages = num_pages
        self.num_promised = 0
        self._gives_up = gives_up
        self._references = [0] * num_pages
        self._num_references = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._kept_cold: OrderedDict[int, None] = OrderedDict()  # goes before those
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_kept(self) -> int:
        """Pages that no sequence holds and the prefix cache could still use."""
        return len(self._kept) + len(self._kept_cold)

    @property
    def num_used(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - len(self._free) - self.num_kept

    @property
    def num_spare(self) -> int:
        """Pages to be had without losing a page that a sequence used to hold."""
        return len(self._free) + len(self._kept_cold)

    @property
    def num_available(self) -> int:
        """Pages that could still be promised."""
        return self.num_pages - (self._num_references if self._gives_up else self.num_used) - self.num_promised

    def find(self, name: bytes) -> int | None:
        return self._page_of.get(name)

    def cost_of_sharing(self, pages: list[int]) -> int:
        """What `num_available` loses when a sequence shares these pages."""
        return len(pages) if self._gives_up else sum(not self._references[page] for page in pages)

    def take(self) -> int:
        """A page with one reference, without a name: a free one, else the kept one that is missed least."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = (self._kept_cold or self._kept).popitem(last=False)
            del self._page_of[self._name_of.pop(page)]
        self._reference(page)
        return page

    def share(self, page: int) -> None:
        """One more reference to a page that `find` gave."""
        if not self._references[page]:
            self._kept.pop(page, None)
            self._kept_cold.pop(page, None)
        self._reference(page)

    def _reference(self, page: int) -> None:
        self._references[page] += 1
        self._num_references += 1

    def release(self, page: int, *, cold: bool = False) -> None:
        """One reference less. `cold`: if the page is kept then, it is the next to go."""
        self._references[page] -= 1
        self._num_references -= 1
        if not self._references[page]:
            if page not in self._name_of:
                self._free.append(page)
            else:
                (self._kept_cold if cold else self._kept)[page] = None

    def name(self, page: int, name: bytes) -> None:
        """Names a full page; nothing happens if it has this name, or if another page has."""
        if page not in self._name_of and name not in self._page_of:
            self._page_of[name], self._name_of[page] = page, name
