"""The sampler on the device: one read of the logits, then one small kernel a canvas. CUDA tensors only.

The definitions are the plain functions of the sampler (soft_cap, vocabulary_pass, accept, next_canvas, converged) and of its noise
(gumbel_noise_rows, renoise_tokens_rows); words of noise are equal bit for bit, floats to rounding. `launch` has the calls, `kernel`
the vocabulary pass, `acceptance_kernel` what follows it on canvases, `noise_kernel` the random numbers of both.

Shape legend: R rows (one a canvas position, in chunks of any size), V vocabulary, S tiles of the vocabulary, B sequences, C canvas
length.

| vocabulary pass | shape, dtype | meaning |
|---|---|---|
| raw_logits | [R, V] bfloat16 or float32 | the head's output, read once |
| temperature | [R] float32 | above 0 |
| greedy | [R] bool | the sampled token is the argmax |
| seeds, canvas_indices, steps, positions | [R] int64 | what the noise depends on; seeds hold the 64 bits of the unsigned seed |
| → argmax, sampled, entropy | [R] int64, int64, float32 | nats |

| noise | shape, dtype | meaning |
|---|---|---|
| seeds, canvas_indices, steps, positions | [R] int64 | as above |
| → noise | [R, V] float32 | what the vocabulary pass adds, for rows that it cannot sample |

| acceptance | shape, dtype | meaning |
|---|---|---|
| entropy, argmax, sampled | [B, C] float32, int64, int64 | of this step |
| bound, confidence_threshold | [B] float32 | nats |
| previous_argmax, stable_steps, stability_threshold | [B, C], [B], [B] int64 | the state of convergence |
| seeds, canvas_indices, steps | [B] int64 | of the renoising |
| → canvas, new_stable_steps, converged | [B, C] int64, [B] int64, [B] bool | the next step's canvas; the row's new state |
"""  # noqa: E501
