"""The CPU path of the attention operator: fused attention calls, one a canvas, one a block of positions of an encoded text.

Encoding goes block by block so that a token's result does not depend on how its text was cut into passes, to the bit: a prompt
encoded in one pass, in chunks, or behind a cached prefix gives the same keys and values. A fused call rounds differently for
another number of queries or keys, so each call has a whole block's queries and all keys from the block's first window to its
end, whether they are there or not: what is missing is zero and masked. Images, whose tokens see later ones, take all of their
sequence's new tokens in one call.
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
    has_images = causal and int(image_block_ids.max()) >= 0
    for sequence, prefix in enumerate(prefix_lengths.tolist()):
        begin, end = starts[sequence], starts[sequence + 1]
        kv, num_cached = new_kv[begin:end], 0
        first = max(0, prefix - window + 1) if window else 0
        if prefix > first:
            first_page = first // page_size
            pages = page_table[sequence, first_page : (prefix + page_size - 1) // page_size]
            cached = kv_pages.index_select(0, pages).flatten(0, 1)
            cached = cached[first - first_page * page_size : prefix - first_page * page_size]
            kv, num_cached = torch.cat([cached, kv]), prefix - first
        if causal and not has_images:
            output[begin:end] = _attend_by_block(query[begin:end], kv, prefix, window)
        else:
            mask = _image_mask(end - begin, num_cached, image_block_ids[begin:end], window) if causal else None
            output[begin:end] = _attend(query[begin:end], kv, mask)
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


def _image_mask(num_new: int, num_cached: int, image_block_ids: torch.Tensor, window: int) -> torch.Tensor:
    """[num_new, num_cached + num_new] bool; keys start at position -num_cached, relative to the first new token."""
    distance = torch.arange(num_new).unsqueeze(1) - torch.arange(-num_cached, num_new).unsqueeze(0)
    visible = distance >= 0
    if window:
        visible &= distance < window
    visible[:, num_cached:] |= (image_block_ids.unsqueeze(1) == image_block_ids) & (image_block_ids.unsqueeze(1) >= 0)
    return visible
