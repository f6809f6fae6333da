"""The CPU path of the attention operator: one fused attention call a sequence, no mask where none is needed."""

import torch
from torch.nn.functional import scaled_dot_product_attention


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
        kv, num_cached = new_kv[begin:end], 0
        first = max(0, prefix - window + 1) if window else 0
        if prefix > first:
            first_page = first // page_size
            pages = page_table[sequence, first_page : (prefix + page_size - 1) // page_size]
            cached = kv_pages.index_select(0, pages).flatten(0, 1)
            cached = cached[first - first_page * page_size : prefix - first_page * page_size]
            kv, num_cached = torch.cat([cached, kv]), prefix - first
        mask = _encode_mask(end - begin, num_cached, image_block_ids[begin:end], window) if causal else None
        output[begin:end] = _attend(query[begin:end], kv, mask)
    return output


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


def _encode_mask(num_new: int, num_cached: int, image_block_ids: torch.Tensor, window: int) -> torch.Tensor | None:
    """[num_new, num_cached + num_new] bool; keys start at position -num_cached, relative to the first new token."""
    if num_new == 1 and (not window or num_cached < window):
        return None
    distance = torch.arange(num_new).unsqueeze(1) - torch.arange(-num_cached, num_new).unsqueeze(0)
    visible = distance >= 0
    if window:
        visible &= distance < window
    if num_new > 1 and int(image_block_ids.max()) >= 0:
        visible[:, num_cached:] |= (image_block_ids.unsqueeze(1) == image_block_ids) & (image_block_ids.unsqueeze(1) >= 0)
    return visible
