"""Top-k, top-p and min-p: which tokens the denoiser canvas may be sampled from.

They restrict the choice, not the prediction. Argmax, entropy, acceptance, convergence and self-conditioning read the unfiltered
distribution: cutting its tail off would lower every entropy, so that a step accepts tokens that the model is not sure of, and
the next step would be fed a prediction surer than any that the model was trained on. top_k = 1 would end every canvas after
its second step.

A token's weight is its probability relative to the most likely token's, w = p / max(p). Every filter keeps the tokens of some
weight or more, so that equal tokens stay or go together and the most likely one always stays:

    top_k   the k-th largest weight or more
    top_p   tokens whose heavier tokens have less than top_p of the probability that top_k has left
    min_p   min_p or more

These and their order are those of transformers' logits warpers, applied after the temperature.
"""

import torch


def filtered_sample(
    processed: torch.Tensor, noise: torch.Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """A token for each row, drawn from softmax(processed) restricted to what the filters keep → [R] int64.

    processed: [R, V] float32; noise: [R, V] float32 Gumbel noise, that of the unfiltered sample; neither is modified. top_k 0,
    top_p 1 and min_p 0 are off. On a GPU, top_p waits for the device: what it does next depends on what was drawn.

    1. weights = exp(processed - max)
    2. The k-th largest weight and min_p are limits: no lighter token may be drawn. top_p counts what top_k leaves.
    3. sampled = argmax(processed + noise) over the tokens that may be drawn (the Gumbel-max trick)
    4. top_p, by rejection: where the tokens heavier than the sampled one have top_p of the probability, neither it nor any
       lighter one may be drawn; draw again. A draw that passes is the argmax over exactly the tokens that top_p keeps, and most
       first draws pass: at most 1 - top_p of them fail. So nothing is sorted.
    """
    weights = (processed - processed.amax(dim=-1, keepdim=True)).exp_()  # 1.
    limit = torch.full_like(weights[:, :1], min_p)  # 2.
    if 0 < top_k < weights.shape[-1]:
        kth = weights.topk(top_k, dim=-1).values[:, -1:]
        weights.masked_fill_(weights < kth, 0)
        limit = torch.maximum(limit, kth)
    scores = (processed + noise).masked_fill_(weights < limit, -torch.inf)
    sampled = scores.argmax(dim=-1)  # 3.
    if top_p < 1:
        _reject(scores, weights, sampled, top_p)
    return sampled


def _reject(scores: torch.Tensor, weights: torch.Tensor, sampled: torch.Tensor, top_p: float) -> None:
    """4. of `filtered_sample`, on `sampled`, in place."""
    enough = weights.sum(dim=-1) * top_p
    rows = torch.arange(len(sampled), device=sampled.device)
    while True:
        drawn = weights.gather(-1, sampled[rows, None])
        heavier = torch.where(weights > drawn, weights, 0).sum(dim=-1)
        rejected = (heavier >= enough) & (drawn[:, 0] < 1)  # with top_p 0, only the most likely tokens stay
        if not rejected.any():
            return
        rows, scores, weights, enough = rows[rejected], scores[rejected], weights[rejected], enough[rejected]
        scores.masked_fill_(weights <= drawn[rejected], -torch.inf)
        sampled[rows] = scores.argmax(dim=-1)
