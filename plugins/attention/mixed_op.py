"""`diffusiongemma::mixed_attention`: of canvases, and of new tokens that a sequence is given in the same pass.

The first rows are the new tokens of one sequence. They are encoded, as `paged_attention` does it; then their keys and values are
written into the sequence's pages; then the canvases are denoised, of which one may be the sequence's next: it sees them.

| input | shape, dtype | meaning |
|---|---|---|
| query, kv, kv_pages, page_table, prefix_lengths, sequence_starts, image_block_ids, window | | as in `plugins.attention`; starts are those of the canvases, counted from the first of their rows, prefix lengths those behind the new tokens |
| new_page_table | [1, P] int32 | the new tokens' sequence |
| new_prefix_length | [1] int32 | what it has without them |
| new_starts | [2] int32 | 0 and their number, filler included |
| new_rows, new_cells | [C] int64 | row new_rows[i] of kv goes to cell new_cells[i] of the pages, page * S + slot; nowhere, where that is -1. Pairs may repeat, but -1 goes with no other |

Programs do not write to their inputs elsewhere, and PyTorch is not told that this one does: it would give the program a copy of
all pages. Nothing but this operator, which does all three in order, reads a layer's pages while the program runs.
"""  # noqa: E501

import torch
from torch import Tensor

from plugins.attention.op import paged_attention
from plugins.library import LIBRARY

LIBRARY.define(
    "mixed_attention(Tensor query, Tensor kv, Tensor kv_pages, Tensor page_table, Tensor prefix_lengths, "
    "Tensor sequence_starts, Tensor image_block_ids, Tensor new_page_table, Tensor new_prefix_length, Tensor new_starts, "
    "Tensor new_rows, Tensor new_cells, int window) -> Tensor"
)


def _mixed_attention(
    query: Tensor,
    kv: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    prefix_lengths: Tensor,
    sequence_starts: Tensor,
    image_block_ids: Tensor,
    new_page_table: Tensor,
    new_prefix_length: Tensor,
    new_starts: Tensor,
    new_rows: Tensor,
    new_cells: Tensor,
    window: int,
) -> Tensor:
    """See the module's docstring."""
    count = new_rows.shape[0]
    new_tokens, canvases = ([each[part] for each in (query, kv)] for part in (slice(count), slice(count, None)))
    no_images = image_block_ids[:count], image_block_ids[count:]
    encoded = paged_attention(*new_tokens, kv_pages, new_page_table, new_prefix_length, new_starts, no_images[0], True, window)
    _write(kv_pages, kv, new_rows, new_cells)
    denoised = paged_attention(*canvases, kv_pages, page_table, prefix_lengths, sequence_starts, no_images[1], False, window)
    return torch.cat([encoded, denoised])


def _write(kv_pages: Tensor, kv: Tensor, rows: Tensor, cells: Tensor) -> None:
    pages, places = kv_pages.flatten(0, 1), cells.clamp(min=0)
    kept = (cells < 0).view(-1, 1, 1, 1)
    pages.index_copy_(0, places, torch.where(kept, pages.index_select(0, places), kv.index_select(0, rows)))


for device in ("CPU", "CUDA"):
    LIBRARY.impl("mixed_attention", _mixed_attention, device)


@torch.library.register_fake("diffusiongemma::mixed_attention", lib=LIBRARY)
def _(query, *others):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


mixed_attention = torch.ops.diffusiongemma.mixed_attention.default
