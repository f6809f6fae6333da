"""Attention of new tokens over paged, cached keys and values and over each other; one operator serves encode and denoise.

Shape legend: T new tokens packed over B sequences, H query heads, K key/value heads, D head_dim, S page_size, N pages,
P page-table columns.

| input | shape, dtype | meaning |
|---|---|---|
| query | [T, H, D] | rotated; scores are not scaled (the family's scale is 1) |
| new_kv | [T, 2, K, D] | rotated keys (0) and values (1) of the new tokens |
| kv_pages | [N, S, 2, K, D] | the cache of one layer, read only |
| page_table | [B, P] int32 | token p of sequence b is at slot p % S of page page_table[b, p // S]; pages that no token can see any more may hold any number |
| prefix_lengths | [B] int32 | cached tokens of each sequence |
| sequence_starts | [B + 1] int32 | new tokens of sequence b are rows starts[b] to starts[b + 1] |
| image_block_ids | [T] int32 | tokens of one image share a number ≥ 0 and see each other; -1 for text |
| causal | bool | encode: token i sees tokens j ≤ i. denoise: every row sees the whole canvas |
| window | int | 0: none. causal: i sees j > i - window. Not causal: all rows see the same last window - 1 cached tokens |

Output: [T, H, D] in the dtype of `query`. Query head h reads key/value head h // (H / K).
"""  # noqa: E501
