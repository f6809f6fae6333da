"""The CPU path of the attention operator: fused attention calls, one a canvas, one a block of positions of an encoded text.

Encoding goes block by block so that a token's result does not depend on how its text was cut into passes, to the bit: a prompt
encoded in one pass, in chunks, or behind a cached prefix gives the same keys and values. A fused call rounds differently for
another number of queries or keys, so each call has a whole block's queries and all keys from the block's first window to its
end, whether they are there or not: what is missing is zero and masked. The tokens of an image, which are in one pass whole and
see later ones, are then done again, in a call an image: their number, and that of their keys, depend on the text alone as well.
"""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

_BLOCK = 32  # positions; on one EPYC core 32 to 128 take the same time for long texts, and short ones pay for what is missing


def paged_attention_cpu(
    query: torch.Tensor,
    new_kv: torch.Tensor,
    kv_pages: torch.Tensor,
    page_table: torch.Tensor,
    prefix_lengths: torch.Tensor,
    sequence_starts: torch.Tensor,
    image_block_ids: torch.Tensor,
    causal: bool,
    window: int,
) -> torch.Tensor:
    """See the package's docstring."""
    output = torch.empty_like(query)
    page_size = kv_pages.shape[1]
    starts = sequence_starts.tolist()
    for sequence, prefix in enumerate(prefix_lengths.tolist()):
        begin, end = starts[sequence], starts[sequence + 1]
        kv = new_kv[begin:end]
        first = max(0, prefix - window + 1) if window else 0
        if prefix > first:
            first_page = first // page_size
            pages = page_table[sequence, first_page : (prefix + page_size - 1) // page_size]
            cached = kv_pages.index_select(0, pages).flatten(0, 1)
            cached = cached[first - first_page * page_size : prefix - first_page * page_size]
            kv = torch.cat([cached, kv])
        if not causal:
            output[begin:end] = _attend(query[begin:end], kv, None)
            continue
        output[begin:end] = _attend_by_block(query[begin:end], kv, prefix, window)
        blocks = image_block_ids[begin:end]
        for image in blocks[blocks >= 0].unique().tolist():
            rows = (blocks == image).nonzero().squeeze(1)
            output[begin + rows] = _attend_image(query[begin + rows], kv, rows, end - begin, prefix, window)
    return output


def _attend_by_block(query: torch.Tensor, kv: torch.Tensor, prefix: int, window: int) -> torch.Tensor:
    """query: [T, H, D] at positions from `prefix`; kv: [L, 2, K, D], the last L positions up to theirs; returns [T, H, D]."""
    end = prefix + query.shape[0]
    start, stop = prefix // _BLOCK * _BLOCK, -(-end // _BLOCK) * _BLOCK
    first = max(0, start - window + 1) if window else 0  # of the keys, as `start` of the queries
    kv = pad(kv, (0, 0, 0, 0, 0, 0, end - kv.shape[0] - first, stop - end))
    query = pad(query, (0, 0, 0, 0, prefix - start, stop - end))
    output = torch.empty_like(query)
    for at in range(start, stop, _BLOCK):
        low = max(0, at - window + 1) if window else 0
        visible = torch.ones(_BLOCK, at + _BLOCK - low, dtype=torch.bool).tril_(at - low)
        if window:
            visible.triu_(at - low - window + 1)
        rows = slice(at - start, at - start + _BLOCK)
        output[rows] = _attend(query[rows], kv[low - first : at + _BLOCK - first], visible)
    return output[prefix - start : end - start]


def _attend(query: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """query: [T, H, D]; kv: [L, 2, K, D]; mask: [T, L] bool or None; returns [T, H, D]."""
    attended = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        kv[:, 0].transpose(0, 1).unsqueeze(0),
        kv[:, 1].transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        scale=1.0,
        enable_gqa=True,
    )
    return attended.squeeze(0).transpose(0, 1)


def _attend_image(
    query: torch.Tensor, kv: torch.Tensor, rows: torch.Tensor, num_new: int, prefix: int, window: int
) -> torch.Tensor:
    """query: [T, H, D], of the image's `rows` [T] among the new tokens; kv as in `_attend_by_block`; returns [T, H, D]."""
    first, stop = prefix + int(rows[0]), prefix + int(rows[-1]) + 1
    low = max(0, first - window + 1) if window else 0
    queries, keys = prefix + rows, torch.arange(low, stop)
    visible = keys <= queries.unsqueeze(1)
    if window:
        visible &= keys > queries.unsqueeze(1) - window
    visible |= torch.isin(keys, queries)
    start = prefix + num_new - kv.shape[0]  # position of the first of `kv`
    return _attend(query, kv[low - start : stop - start], visible)
