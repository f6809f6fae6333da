"""The paged KV cache: keys and values of every committed token, in pages that sequences own.

    pages of layer l      [num_pages, page_size, 2, K, head_dim]      keys at index 0, values at 1
    table of a layer type [max_sequences, columns] int32              page of tokens column * page_size …

All layers of one type share page numbers, so a page number costs one page in each of them. Full-attention layers keep every
token. Sliding layers keep the last window - 1 tokens, which is all that any later token can see: pages that fall out of the
window go back at once.
"""

from collections.abc import Mapping, Sequence

import torch

from contract.model_config import LayerType, ModelConfig


class _Pool:
    """Page numbers of one layer type. Reserving is a promise that taking later succeeds."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.free = list(range(num_pages - 1, -1, -1))
        self.num_reserved = 0

    @property
    def num_unreserved(self) -> int:
        return self.num_pages - self.num_reserved


class PagedKVCache:
    """The pages, who owns them, and the tables that programs read them through. One owner, one thread.

    A sequence lives in a slot from `open` to `close`; `length[slot]` counts its cached tokens.
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
    ):
        self.page_size = page_size
        self.length = [0] * max_sequences
        self.pages = [
            torch.zeros(
                num_pages[kind],
                page_size,
                2,
                model.attention[kind].num_kv_heads,
                model.attention[kind].head_dim,
                dtype=dtype,
                device=device,
            )
            for kind in model.layer_types
        ]
        self._layer_types = model.layer_types
        self._kept = {kind: attention.window - 1 if attention.window else None for kind, attention in model.attention.items()}
        self._pools = {kind: _Pool(num_pages[kind]) for kind in model.attention}
        columns = -(-max_tokens // page_size)
        self._tables = {kind: torch.zeros(max_sequences, columns, dtype=torch.int32, device=device) for kind in model.attention}
        self._owned: list[dict[LayerType, dict[int, int]]] = [{} for _ in range(max_sequences)]  # slot → column → page
        self._promised: list[dict[LayerType, int]] = [{} for _ in range(max_sequences)]
        self._free_slots = list(range(max_sequences - 1, -1, -1))

    def pages_needed(self, num_tokens: int) -> dict[LayerType, int]:
        """The most pages of each layer type that a sequence of `num_tokens` cached tokens ever owns at once."""
        return {kind: self._most_pages(kept, num_tokens) for kind, kept in self._kept.items()}

    def _most_pages(self, kept: int | None, num_tokens: int) -> int:
        pages = -(-num_tokens // self.page_size)
        # A window of `kept` tokens that starts in the middle of a page touches one page more.
        return pages if kept is None else min(pages, -(-kept // self.page_size) + 1)

    def fits(self, num_tokens: int, *, when_empty: bool = False) -> bool:
        """Whether a sequence of `num_tokens` can be opened now, or could be if no other were there."""
        needed = self.pages_needed(num_tokens)
        if when_empty:
            return all(pool.num_pages >= needed[kind] for kind, pool in self._pools.items())
        return bool(self._free_slots) and all(pool.num_unreserved >= needed[kind] for kind, pool in self._pools.items())

    def open(self, num_tokens: int) -> int:
        """Reserves the pages for a sequence of at most `num_tokens` cached tokens and returns its slot; `fits` must hold."""
        needed = self.pages_needed(num_tokens)
        for kind, pool in self._pools.items():
            assert pool.num_unreserved >= needed[kind]
            pool.num_reserved += needed[kind]
        slot = self._free_slots.pop()
        self._promised[slot] = needed
        self._owned[slot] = {kind: {} for kind in self._pools}
        self.length[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        """Gives back the slot, its pages and what was reserved for it."""
        for kind, pool in self._pools.items():
            pool.free.extend(self._owned[slot][kind].values())
            pool.num_reserved -= self._promised[slot][kind]
        self._owned[slot], self._promised[slot] = {}, {}
        self._free_slots.append(slot)

    @property
    def num_pages_used(self) -> dict[LayerType, int]:
        return {kind: pool.num_pages - len(pool.free) for kind, pool in self._pools.items()}

    def tables(self, slots: Sequence[int]) -> dict[LayerType, torch.Tensor]:
        """The page tables of `slots` as [B, columns] int32, as wide as the longest of them needs."""
        rows = torch.tensor(slots)
        columns = max(1, max(-(-self.length[slot] // self.page_size) for slot in slots))
        return {kind: table[:, :columns].index_select(0, rows) for kind, table in self._tables.items()}

    def append(self, slots: Sequence[int], counts: Sequence[int], new_kv: Sequence[torch.Tensor]) -> None:
        """Writes the keys and values of new tokens behind what each sequence has, and frees pages that left the window.

        counts: new tokens of each of `slots`; new_kv: for each layer [sum(counts), 2, K, head_dim], in the order of `slots`.
        """
        rows: dict[LayerType, torch.Tensor] = {}
        cells: dict[LayerType, torch.Tensor] = {}
        for kind in self._pools:
            parts_rows, parts_cells, begin = [], [], 0
            for slot, count in zip(slots, counts, strict=True):
                first = self._advance(slot, kind, count)
                positions = torch.arange(first, self.length[slot] + count)
                table = self._tables[kind][slot]
                parts_cells.append(table[positions // self.page_size].long() * self.page_size + positions % self.page_size)
                parts_rows.append(positions - self.length[slot] + begin)
                begin += count
            rows[kind], cells[kind] = torch.cat(parts_rows), torch.cat(parts_cells)
        for kind, pages, kv in zip(self._layer_types, self.pages, new_kv, strict=True):
            pages.flatten(0, 1).index_copy_(0, cells[kind], kv.index_select(0, rows[kind]))
        for slot, count in zip(slots, counts, strict=True):
            self.length[slot] += count

    def _advance(self, slot: int, kind: LayerType, count: int) -> int:
        """Makes room for `count` more tokens; returns the first new position that is worth writing."""
        pool, owned, kept = self._pools[kind], self._owned[slot][kind], self._kept[kind]
        new_length = self.length[slot] + count
        first_kept = 0 if kept is None else max(0, new_length - kept)
        for column in [column for column in owned if column < first_kept // self.page_size]:
            pool.free.append(owned.pop(column))
        first = max(self.length[slot], first_kept)
        for column in range(first // self.page_size, -(-new_length // self.page_size)):
            if column not in owned:
                owned[column] = pool.free.pop()
                self._tables[kind][slot, column] = owned[column]
        return first
