"""The sampler on the device: one read of the logits, then one small kernel a canvas. CUDA tensors only.

The definitions are the plain functions of the sampler (soft_cap, vocabulary_pass, accept, next_canvas, converged, filtered_sample,
top_logprobs) and of its noise (gumbel_noise_rows, renoise_tokens_rows); words of noise are equal bit for bit, floats to rounding.
`launch` has the vocabulary pass and what follows it on canvases, `filters`, `logprobs` and `feedback` the other passes over logits.
A kernel is in the module that is named after it; `order_kernel` finds the k-th largest, `noise_kernel` makes the random numbers.
`tables` has what requests ask for beyond the plain pass. `cpu.cpp` is the same for compiled CPU engines, float32.

Shape legend: R rows (one a canvas position, in chunks of any size), V vocabulary, S slots (of sequences), B sequences, C canvas length,
K the most alternatives.

| every pass over logits | shape, dtype | meaning |
|---|---|---|
| raw_logits | [R, V] bfloat16 or float32 | the head's output |
| temperature | [R] float32 | above 0 |
| adjustment: bias, biased | [S, V] float32, [S] bool | what is added to the soft-capped logits; which slots have any |
| … repeated, penalties | [S, V / 32] int32, [S] float32 | a bit a token: whose logits come nearer to 0 if positive, else go further; by what factor, 1 is off |
| … slots | [R] int64 | of the rows |

| vocabulary pass | shape, dtype | meaning |
|---|---|---|
| greedy | [R] bool | the sampled token is the argmax |
| seeds, canvas_indices, steps, positions | [R] int64 | what the noise depends on; seeds hold the 64 bits of the unsigned seed |
| → argmax, sampled, entropy, logprob | [R] int64, int64, float32, float32 | nats; logprob is the argmax's |

| filters | shape, dtype | meaning |
|---|---|---|
| top_k, top_p, min_p | [S] int64, float32, float32 | 0, 1 and 0 are off |
| sampled | [R] int64 | drawn again, in place, where a filter does not let it through |

| log probabilities | shape, dtype | meaning |
|---|---|---|
| counts | [S] int64 | how many alternatives a slot wants; -1: nothing |
| logprobs, tokens, values | [S, C] float32, [S, C, K] int64, [S, C, K] float32 | written where they are wanted: the argmax's, the alternatives |

| acceptance | shape, dtype | meaning |
|---|---|---|
| entropy, argmax, sampled | [B, C] float32, int64, int64 | of this step |
| bound, confidence_threshold | [B] float32 | nats |
| previous_argmax, stable_steps, stability_threshold | [B, C], [B], [B] int64 | the state of convergence |
| seeds, canvas_indices, steps | [B] int64 | of the renoising |
| → canvas, new_stable_steps, converged | [B, C] int64, [B] int64, [B] bool | the next step's canvas; the row's new state |
"""  # noqa: E501
