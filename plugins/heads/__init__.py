"""What lies between the product that makes queries, keys and values and the attention: norms and rotations of heads.

Shape legend: T tokens, H query heads, K key/value heads, d head_dim.

| input | shape, dtype | meaning |
|---|---|---|
| heads | [T, (H + 2 K) d], or [T, (H + K) d] | of each token the queries, the keys and, where the layer has them, the values |
| q_norm, k_norm | [d] | weights of the norms of queries and keys |
| cos, sin | [T, 1, d] | of the tokens' angles; the pairs (i, i + d / 2) turn |

Without values of their own, the value is the key before its norm and rotation. Values are normed without a weight.
Outputs: query [T, H, d] and new_kv [T, 2, K, d], as the attention operator takes them.
"""
