"""What follows the attention in a layer: the residual sum, a dense gated MLP beside a mixture of experts, their norms.

Shape legend: N rows, D hidden, F width of the MLP, E experts, k experts a row. `norm` is `plugins.rms_norm`, and
mlp(x) = down(gelu_tanh(gate(x)) * up(x)).

    residual = hidden + norm(attended, post_attention)
    dense    = mlp(norm(residual, pre_dense))
    sparse   = experts(norm(residual, pre_experts)), chosen by the router from the residual
    mixed    = norm(dense, post_dense) + norm(sparse, post_experts)
    output   = (residual + norm(mixed, post_feed_forward)) * scalar
    normed   = norm(output, next): what the next layer reads, beside its residual

| input | shape | meaning |
|---|---|---|
| hidden, attended | [N, D] | the layer's input; its attention's output |
| norms | 7 of [D] | post_attention, pre_dense, pre_experts, post_dense, post_experts, post_feed_forward, next |
| scalar | [1] or [N] | of all rows, or of each |
| dense | [2 F, D], [D, F] | gate and up, down |
| router | [D], [E, D], [E] | scale of the normed residual, projection, scale of the experts' weights |
| experts | as the experts operators of `plugins.moe` take them: 2 tensors, or 4 with FP8 weights | |

Outputs: output [N, D] and normed [N, D].

On a GPU the MLP runs on a stream of its own beside the router and the experts: these wait for memory, that for arithmetic.
"""
