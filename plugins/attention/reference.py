"""The definition of the attention operator, in float32 and with the mask written out."""

import torch


def paged_attention_reference(
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
    """See the package's docstring. One token's score row at a time would be clearer still, but too slow for tests."""
    output = torch.empty_like(query)
    page_size, num_kv_heads = kv_pages.shape[1], new_kv.shape[2]
    for sequence, prefix in enumerate(prefix_lengths.tolist()):
        rows = slice(int(sequence_starts[sequence]), int(sequence_starts[sequence + 1]))
        num_new = rows.stop - rows.start
        # Key positions: cached tokens that some row can see, then the new tokens.
        first = max(0, prefix - window + 1) if window else 0
        cached = torch.arange(first, prefix)
        pages = page_table[sequence].long()[cached // page_size]
        kv = torch.cat([kv_pages[pages, cached % page_size], new_kv[rows]]).float()
        keys = torch.cat([cached, torch.arange(prefix, prefix + num_new)])
        queries = torch.arange(prefix, prefix + num_new)

        visible = torch.ones(num_new, keys.numel(), dtype=torch.bool)
        if causal:
            visible = keys[None, :] <= queries[:, None]
            blocks = image_block_ids[rows]
            same_image = (blocks[:, None] == blocks[None, :]) & (blocks[:, None] >= 0)
            visible[:, cached.numel() :] |= same_image
            if window:
                near = keys[None, :] > queries[:, None] - window
                near[:, cached.numel() :] |= same_image
                visible &= near

        heads = query.shape[1] // num_kv_heads
        k, v = kv[:, 0].repeat_interleave(heads, dim=1), kv[:, 1].repeat_interleave(heads, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[rows].float(), k).masked_fill(~visible, float("-inf"))
        output[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(query.dtype)
    return output
