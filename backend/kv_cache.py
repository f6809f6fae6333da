"""The paged KV cache: keys and values of every committed token, in pages that sequences own.

    pages of layer l      [num_pages, page_size, 2, K, head_dim]      keys at index 0, values at 1
    table of a layer type [max_sequences, columns] int32              page of tokens column * page_size …

All layers of one type share page numbers, so a page number costs one page in each of them. Full-attention layers keep every
token. Sliding layers keep the last window - 1 tokens, which is all that any later token can see: pages that fall out of the
window go back at once.
"""

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from backend.page_pool import PagePool
from backend.planner import pages_needed
from backend.prefix_cache import ImageSpan, usable_pages
from contract.model_config import LayerType, ModelConfig


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU, zeros that take no memory before they are written: a host may have less than all pages would take."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes).view(dtype).view(shape)


class PagedKVCache:
    """The pages, who owns them, and the tables that programs read them through. One owner, one thread.

    A sequence lives in a slot from `open` to `close`; `length[slot]` counts its cached tokens. Sequences share the pages of a
    common prefix (`prefix_cache`); full pages are never written again, so no page is ever copied.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        page_size: int,
        num_pages: Mapping[LayerType, int],
        max_sequences: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        shared_multiple: int = 1,
    ):
        """shared_multiple: sequences share pages in multiples of so many."""
        self.page_size, self._shared_multiple = page_size, shared_multiple
        self.length = [0] * max_sequences
        self.pages = [
            zeros(
                (num_pages[kind], page_size, 2, model.attention[kind].num_kv_heads, model.attention[kind].head_dim),
                dtype,
                device,
            )
            for kind in model.layer_types
        ]
        self._layer_types = model.layer_types
        self._kept = {kind: attention.window - 1 if attention.window else None for kind, attention in model.attention.items()}
        self._pools = {kind: PagePool(num_pages[kind], gives_up=self._kept[kind] is not None) for kind in model.attention}
        columns = -(-max_tokens // page_size)
        # Kept on the host, where pages change hands one at a time, and copied to where programs read them. The last row is no
        # slot's.
        self._tables = {kind: torch.zeros(max_sequences + 1, columns, dtype=torch.int32) for kind in model.attention}
        self.device_tables = {kind: table.to(device) for kind, table in self._tables.items()}
        """By layer type: every slot's page table, [max_sequences + 1, columns] int32 on the device; see `upload_tables`."""
        self._changed: set[int] = set()  # slots whose tables on the device are old
        self._owned: list[dict[LayerType, dict[int, int]]] = [{} for _ in range(max_sequences)]  # slot → column → page
        self._most: list[dict[LayerType, int]] = [{} for _ in range(max_sequences)]  # pages that the slot may hold at once
        self._free_slots = list(range(max_sequences - 1, -1, -1))

    def pages_needed(self, num_tokens: int) -> dict[LayerType, int]:
        """See `planner.pages_needed`."""
        return pages_needed(num_tokens, self.page_size, self._kept)

    def fits(
        self,
        num_tokens: int,
        *,
        page_keys: Sequence[bytes] = (),
        images: Sequence[ImageSpan] = (),
        when_empty: bool = False,
    ) -> bool:
        """Whether a sequence of `num_tokens` can be opened now, or could be if no other were there. Pages that only the prefix
        cache holds count as free."""
        needed = self.pages_needed(num_tokens)
        if when_empty:
            return all(pool.num_pages >= needed[kind] for kind, pool in self._pools.items())
        if not self._free_slots:
            return False
        _, shared = self._shared(page_keys, images)
        return all(
            pool.num_available >= needed[kind] - len(shared[kind]) + pool.cost_of_sharing([*shared[kind].values()])
            for kind, pool in self._pools.items()
        )

    def open(self, num_tokens: int, *, page_keys: Sequence[bytes] = (), images: Sequence[ImageSpan] = ()) -> int:
        """Promises the pages for a sequence of at most `num_tokens` cached tokens and returns its slot; `fits` must hold.

        page_keys: keys of the sequence's first pages (`prefix_cache`). Those that are cached are taken over: `length` of the
        slot says how many tokens that is.
        """
        (num_shared, shared), most = self._shared(page_keys, images), self.pages_needed(num_tokens)
        slot = self._free_slots.pop()
        self._owned[slot], self._most[slot] = shared, most
        self._changed.add(slot)
        for kind, pool in self._pools.items():
            for column, page in shared[kind].items():
                pool.share(page)
                self._tables[kind][slot, column] = page
            pool.num_promised += most[kind] - len(shared[kind])
            assert pool.num_available >= 0, "open without fits"
        self.length[slot] = num_shared * self.page_size
        return slot

    def _shared(self, page_keys: Sequence[bytes], images: Sequence[ImageSpan]) -> tuple[int, dict[LayerType, dict[int, int]]]:
        """How many cached pages a sequence with these keys starts from, and those that are still seen: column → page."""
        end = usable_pages(page_keys, self._pools, self._kept, self.page_size, images, self._shared_multiple)
        shared: dict[LayerType, dict[int, int]] = {}
        for kind, kept in self._kept.items():
            first = 0 if kept is None else max(0, end * self.page_size - kept) // self.page_size
            shared[kind] = {column: self._pools[kind].find(page_keys[column]) for column in range(first, end)}
        return end, shared

    def close(self, slot: int) -> None:
        """Gives back the slot, its pages and what was promised to it."""
        for kind, pool in self._pools.items():
            owned = self._owned[slot][kind]
            pool.num_promised -= self._most[slot][kind] - len(owned)
            # Of full-attention layers the last pages go first: without the first ones they are of no use.
            for column in sorted(owned, reverse=self._kept[kind] is None):
                pool.release(owned[column])
        self._owned[slot], self._most[slot] = {}, {}
        self._free_slots.append(slot)

    @property
    def num_pages(self) -> dict[LayerType, int]:
        return {kind: pool.num_pages for kind, pool in self._pools.items()}

    @property
    def num_pages_used(self) -> dict[LayerType, int]:
        """Pages that sequences hold; one that several share counts once."""
        return {kind: pool.num_used for kind, pool in self._pools.items()}

    @property
    def num_pages_kept(self) -> dict[LayerType, int]:
        """Pages that only the prefix cache holds."""
        return {kind: pool.num_kept for kind, pool in self._pools.items()}

    def tables(self, slots: Sequence[int]) -> dict[LayerType, torch.Tensor]:
        """The page tables of `slots` as [B, columns] int32 on the device, as wide as the longest of them needs."""
        rows = torch.tensor(slots)
        columns = max(1, max(-(-self.length[slot] // self.page_size) for slot in slots))
        self.upload_tables()
        return {
            kind: table[:, :columns].index_select(0, rows.to(table.device, non_blocking=True))
            for kind, table in self.device_tables.items()
        }

    def append(
        self,
        slots: Sequence[int],
        counts: Sequence[int],
        new_kv: Sequence[torch.Tensor],
        *,
        page_keys: Sequence[Sequence[bytes]] | None = None,
    ) -> None:
        """Writes the keys and values of new tokens behind what each sequence has, and gives up pages that left the window.

        counts: new tokens of each of `slots`; new_kv: for each layer [sum(counts) or more, 2, K, head_dim], in the order of
        `slots`. page_keys: for each slot the keys of its full pages, or of the first of them, which are then kept for the
        prefix cache; None keeps nothing.
        """
        with self.appending(slots, counts, page_keys=page_keys) as places:
            on_device = {
                kind: each.to(self.device_tables[kind].device, non_blocking=True).unbind() for kind, each in places.items()
            }
            for kind, pages, kv in zip(self._layer_types, self.pages, new_kv, strict=True):
                rows, cells = on_device[kind]
                pages.flatten(0, 1).index_copy_(0, cells, kv.index_select(0, rows))

    @contextmanager
    def appending(
        self, slots: Sequence[int], counts: Sequence[int], *, page_keys: Sequence[Sequence[bytes]] | None = None
    ) -> Iterator[dict[LayerType, torch.Tensor]]:
        """Around what writes the keys and values of new tokens behind what each sequence has: see `append`. `length` has them
        from the beginning.

        Gives for each layer type rows and cells, [2, …] int64 on the host: the new token, counted over all sequences, whose
        keys and values go to the cell page * page_size + slot. Tokens that are out of the window already are not among them.
        """
        lengths = [self.length[slot] for slot in slots]
        firsts = {
            kind: [self._advance(slot, kind, count) for slot, count in zip(slots, counts, strict=True)] for kind in self._pools
        }
        passing: dict[tuple[int, LayerType], dict[int, int]] = {}
        try:
            if page_keys is not None:  # after all have what they were promised
                for kind in self._pools:
                    for slot, first in zip(slots, firsts[kind], strict=True):
                        self._take_passing(slot, kind, first, passing.setdefault((slot, kind), {}))
            places: dict[LayerType, torch.Tensor] = {}
            for kind in self._pools:
                parts, begin = [], 0
                for slot, count, first in zip(slots, counts, firsts[kind], strict=True):
                    first -= len(passing.get((slot, kind), ())) * self.page_size
                    positions = torch.arange(first, self.length[slot] + count)
                    cells = self._tables[kind][slot][positions // self.page_size].long() * self.page_size
                    parts.append(torch.stack([positions - self.length[slot] + begin, cells + positions % self.page_size]))
                    begin += count
                places[kind] = torch.cat(parts, dim=1)
            self.upload_tables()
            for slot, count in zip(slots, counts, strict=True):
                self.length[slot] += count
            yield places
            for index, (slot, count) in enumerate(zip(slots, counts, strict=True)):
                filled = range(lengths[index] // self.page_size, (lengths[index] + count) // self.page_size)
                for kind, pool in self._pools.items():
                    pages = self._owned[slot][kind] | passing.get((slot, kind), {})
                    for column in filled if page_keys is not None else ():
                        if column in pages and column < len(page_keys[index]):
                            pool.name(pages[column], page_keys[index][column])
        finally:
            for (_, kind), pages in passing.items():
                for page in pages.values():
                    self._pools[kind].release(page, cold=True)

    def upload_tables(self) -> None:
        """Copies the tables that have changed to `device_tables`; `tables` and `append` do it too."""
        for kind, table in self.device_tables.items():
            if table is not self._tables[kind]:
                for slot in self._changed:
                    table[slot].copy_(self._tables[kind][slot], non_blocking=True)
        self._changed.clear()

    def _advance(self, slot: int, kind: LayerType, count: int) -> int:
        """Makes room for `count` more tokens; returns the first new position to write, from which on whole pages are owned."""
        pool, owned, kept = self._pools[kind], self._owned[slot][kind], self._kept[kind]
        self._changed.add(slot)
        new_length = self.length[slot] + count
        first_column = 0 if kept is None else max(0, new_length - kept) // self.page_size
        for column in [column for column in owned if column < first_column]:
            pool.release(owned.pop(column))
            pool.num_promised += 1
        first = max(self.length[slot], first_column * self.page_size)
        for column in range(first // self.page_size, -(-new_length // self.page_size)):
            if column not in owned:
                owned[column] = pool.take()
                pool.num_promised -= 1
                self._tables[kind][slot, column] = owned[column]
        return first

    def _take_passing(self, slot: int, kind: LayerType, first: int, pages: dict[int, int]) -> None:
        """Adds to `pages`, which the caller releases, those for new tokens that are out of the window already, for prompts that
        will part from this one there: as many as there are spare ones, the last columns before position `first`."""
        pool, end = self._pools[kind], first // self.page_size
        for column in range(max(-(-self.length[slot] // self.page_size), end - pool.num_spare), end):
            pages[column] = pool.take()
            self._tables[kind][slot, column] = pages[column]
