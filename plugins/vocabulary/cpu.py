"""The sampler's operators in C++, float32 on the CPU; see `plugins.cpu`. Arguments are those of the package's docstring.

`vocabulary_cpu` is the vocabulary pass, the filters and the log probabilities. It writes exp(processed logits - their maximum)
over the logits and returns their sum beside argmax, sampled token and entropy. Divided by it they are the probabilities that
the next step's soft embeddings are made of. cap: 0 for none.
"""

import torch

from plugins.library import LIBRARY

LIBRARY.define(
    "vocabulary_cpu(Tensor(a!) logits, float cap, Tensor temperature, Tensor bias, Tensor biased, Tensor repeated, "
    "Tensor penalties, Tensor slots, Tensor greedy, Tensor seeds, Tensor canvas_indices, Tensor steps, Tensor positions, "
    "Tensor top_k, Tensor top_p, Tensor min_p, Tensor counts, Tensor(b!) logprobs, Tensor(c!) tokens, Tensor(d!) values) "
    "-> (Tensor argmax, Tensor sampled, Tensor entropy, Tensor total)"
)
LIBRARY.define(
    "advance_cpu(Tensor entropy, Tensor argmax, Tensor sampled, Tensor bound, Tensor confidence_threshold, "
    "Tensor previous_argmax, Tensor stable_steps, Tensor stability_threshold, Tensor seeds, Tensor canvas_indices, "
    "Tensor steps, int vocab_size) -> (Tensor canvas, Tensor new_stable_steps, Tensor converged)"
)

vocabulary_cpu = torch.ops.diffusiongemma.vocabulary_cpu.default
advance_cpu = torch.ops.diffusiongemma.advance_cpu.default
