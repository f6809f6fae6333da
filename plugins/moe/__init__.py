"""The mixture of experts: dispatch rows to their top_k experts, run the gated MLPs, combine with the routing weights.

Shape legend: N rows, E experts, k experts a row, D hidden, F expert width.

| input | shape, dtype | meaning |
|---|---|---|
| hidden | [N, D] | normed rows |
| top_k_index | [N, k] int64 | the experts of each row, all different |
| top_k_weights | [N, k] float32 | their weights |
| gate_up_proj | [E, 2 F, D] | gate rows first, then up rows |
| down_proj | [E, D, F] | |

Output: [N, D] in the dtype of `hidden`: sum over a row's experts of weight * down(gelu_tanh(gate(x)) * up(x)).
"""
