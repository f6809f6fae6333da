"""The mixture of experts: choose experts, dispatch rows to them, run the gated MLPs, combine with the routing weights.

Shape legend: N rows, E experts, k experts a row, D hidden, F expert width.

| input | shape, dtype | meaning |
|---|---|---|
| hidden | [N, D] | normed rows |
| top_k_index | [N, k] int64 | the experts of each row, all different |
| top_k_weights | [N, k] float32 | their weights |
| gate_up_proj | [E, 2 F, D] | gate rows first, then up rows; or packed, or in 4 bits |
| down_proj | [E, D, F] | or as gate_up_proj is |

Output: [N, D] in the dtype of `hidden`: sum over a row's experts of weight * down(gelu_tanh(gate(x)) * up(x)).

The router's second half is an operator of its own, `choose_experts`: from logits [N, E] and per_expert_scale [E], softmax over
the experts, the k largest, renormalised, times the experts' scale. Outputs top_k_weights and top_k_index as above. Packed
weights are bfloat16 numbers in 12 bits, as int32 tensors (see `packing`), those in 4 bits int16 tensors (see `int4`);
gate_up_proj is stored so with its halves in turns.
With FP8 weights, `experts_fp8`, the weights are float8_e4m3fn and each is followed by its scales, float32, one for an output
channel: gate_up_proj_scale [E, 2 F] and down_proj_scale [E, D]. `fp8_rows` says what the products read of the rows: FP8 too,
with a scale for each row, or the rows as they are.
"""
