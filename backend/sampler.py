"""One sampler update of a denoising step: a pass over the vocabulary, acceptance, renoising, convergence. Plain PyTorch.

The vocabulary pass works on flat rows (one row a canvas position), so that it can run over chunks of rows: nothing of size
rows x vocabulary need outlive a chunk. What follows it works on canvases and is small.

    1. temperature   temperature_schedule   per row, from its steps remaining
    2. soft cap      soft_cap               raw logits in model dtype → float32
    3. vocabulary    vocabulary_pass        penalty, bias, temperature → processed logits; argmax, sampled token, entropy
    4. feedback      soft_embeddings        processed logits → soft embeddings for the next step's self-conditioning
    5. acceptance    accept                 the low-entropy tokens of each canvas
    6. renoising     next_canvas            accepted tokens stay, the others become random
    7. convergence   converged              which rows are done

Between 3 and 5, and after 4, `put_given` puts in what a request gives of its answer.

Shapes: R rows, B sequences, C canvas length, V vocabulary, D hidden size. Everything is on the device of its inputs and nothing
here waits for the device.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from backend.infill import BLANK

FORBIDDEN = -1e9
"""The bias of a token that must not be: nothing of its probability is left in float32, whatever the temperature, and no
infinity is subtracted from another."""
NO_CANVAS = -1  # fills the previous argmax canvas of a row at its first step: equal to no token


def temperature_schedule(
    t_min: torch.Tensor, t_max: torch.Tensor, steps_remaining: torch.Tensor, num_steps: torch.Tensor
) -> torch.Tensor:
    """Temperature of each row at its step: t_min + (t_max - t_min) * steps_remaining / num_steps → [R] float32.

    t_min, t_max: [R] float64 (not float32: their difference is rounded once). steps_remaining, num_steps: [R] integers; the
    steps remaining count down from num_steps at the first step to 1 at the last. The order and precision of the operations
    are those of transformers, bit for bit: the difference in float64, everything else in float32.
    """
    fraction = steps_remaining.to(torch.float32) / num_steps.to(torch.float32)
    return t_min.to(torch.float32) + (t_max - t_min).to(torch.float32) * fraction


def soft_cap(raw_logits: torch.Tensor, cap: float | None, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """cap * tanh(raw_logits / cap), or raw_logits where cap is None: float32 of the same shape, in `out` or a new tensor."""
    logits = raw_logits.to(torch.float32, copy=True) if out is None else out.copy_(raw_logits)
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


class Repetition(NamedTuple):
    """Tokens that one request penalizes in its rows, first_row up to end_row of a chunk: a soft-capped logit is divided by the
    penalty if it is positive and else multiplied with it, as by transformers' RepetitionPenaltyLogitsProcessor."""

    first_row: int
    end_row: int
    token_ids: torch.Tensor  # [N] int64, each once
    penalty: float  # above 0


class LogitBias(NamedTuple):
    """What one request adds to the soft-capped logits of its rows, first_row up to end_row of a chunk."""

    first_row: int
    end_row: int
    token_ids: torch.Tensor  # [N] int64, each once
    values: torch.Tensor  # [N] float32


class VocabularyPass(NamedTuple):
    """What one step keeps of R rows of logits. `processed` is the caller's to drop as soon as its chunk is done with."""

    processed: torch.Tensor  # [R, V] float32
    argmax: torch.Tensor  # [R] int64: the most likely token
    sampled: torch.Tensor  # [R] int64: a token drawn from softmax(processed)
    entropy: torch.Tensor  # [R] float32, nats, of softmax(processed)
    logprob: torch.Tensor  # [R] float32: log softmax(processed) of the argmax


def vocabulary_pass(
    raw_logits: torch.Tensor,
    *,
    cap: float | None,
    temperature: torch.Tensor,
    noise: torch.Tensor | None,
    repetitions: Sequence[Repetition] = (),
    bias: Sequence[LogitBias] = (),
) -> VocabularyPass:
    """Everything that needs a row's whole vocabulary, except self-conditioning.

    raw_logits: [R, V] model dtype, not modified. temperature: [R] float32, above 0. noise: [R, V] float32 Gumbel noise, or
    None to sample the argmax. repetitions, bias: of the rows that have one.

    1. processed = (soft_cap(raw_logits), of repeated tokens penalized, + bias) / temperature
    2. argmax = most likely token (the first of equals)
    3. sampled = argmax(processed + noise), which has the distribution softmax(processed) (the Gumbel-max trick)
    4. entropy = log(Z) - sum(w * shifted) / Z, with shifted = processed - max, w = exp(shifted), Z = sum(w):
       -sum(p log p) with the logarithm split, so that nothing normalised is formed. Both terms are at least 0, so nothing
       cancels where the entropy is small, which is where acceptance and convergence compare it.
    5. logprob = -log(Z), because shifted is 0 there.

    The steps are taken over a few rows at a time, as many as a CPU's cache holds.
    """
    processed = torch.empty_like(raw_logits, dtype=torch.float32)
    argmax, sampled = (torch.empty(len(raw_logits), dtype=torch.int64, device=raw_logits.device) for _ in range(2))
    entropy, logprob = (torch.empty(len(raw_logits), dtype=torch.float32, device=raw_logits.device) for _ in range(2))
    for first, end in _row_blocks(raw_logits):
        rows = slice(first, end)
        block = soft_cap(raw_logits[rows], cap, out=processed[rows])  # 1.
        for each in repetitions:
            of_request = block[_rows_of(each, first)]
            repeated = of_request[:, each.token_ids]
            of_request[:, each.token_ids] = repeated.mul(each.penalty).where(repeated < 0, repeated / each.penalty)
        for each in bias:
            block[_rows_of(each, first), each.token_ids] += each.values
        block.div_(temperature[rows, None])
        largest, argmax[rows] = block.max(dim=-1)  # 2.
        sampled[rows] = argmax[rows] if noise is None else (block + noise[rows]).argmax(dim=-1)  # 3.

        shifted = block - largest[:, None]  # 4.
        weights = shifted.exp()
        total = weights.sum(dim=-1)
        if cap is None:  # an uncapped logit may be -infinity (a forbidden token), and 0 * -infinity is not the limit, 0
            shifted.clamp_(min=torch.finfo(torch.float32).min)
        log_total = total.log()
        entropy[rows] = log_total - weights.mul_(shifted).sum(dim=-1) / total
        logprob[rows] = -log_total  # 5.
    return VocabularyPass(processed, argmax, sampled, entropy, logprob)


def soft_embeddings(processed: torch.Tensor, embedding: torch.Tensor, embed_scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The prediction as an embedding: the mean of the token embeddings under softmax(processed), scaled → [R, D] `dtype`.

    processed: [R, V] float32; embedding: [V, D] `dtype`, the tied embedding; embed_scale: sqrt(hidden_size). Logits are
    rounded to the model's dtype before the softmax, probabilities after it, and the scale too: transformers does, and the
    model was trained so.
    """
    probabilities = processed.to(dtype).softmax(dim=-1, dtype=torch.float32).to(dtype)
    return _scaled(probabilities @ embedding, embed_scale)


def accept(entropy: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """The tokens to keep from the denoiser canvas: the entropy-bound rule (Ben-Hamu et al., arXiv:2505.24857).

    entropy: [B, C] float32, nats; bound: [B] float32. Result: [B, C] bool, at least one token a row.

    1. Sort the tokens of a canvas by entropy, ascending (equal entropies in the order the device's sort leaves them).
    2. Accept the longest run of first tokens with sum(entropies) - max(entropies) <= bound. The left side bounds the mutual
       information of the run; its maximum is its last entropy, because it is sorted.
    3. Put the decision back at the tokens' positions.
    """
    ascending, order = entropy.sort(dim=-1)  # 1.
    accepted = ascending.cumsum(dim=-1) - ascending <= bound[:, None]  # 2.
    return torch.zeros_like(accepted).scatter_(-1, order, accepted)  # 3.


def next_canvas(mask: torch.Tensor, denoiser_canvas: torch.Tensor, renoise: torch.Tensor) -> torch.Tensor:
    """The canvas that the next step sees: accepted tokens stay, the others become random. All [B, C]."""
    return torch.where(mask, denoiser_canvas, renoise)


def put_given(
    given: torch.Tensor, argmax: torch.Tensor, sampled: torch.Tensor, entropy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """argmax, sampled and entropy as if each given token were the only one possible in its place: it is sure.

    All of one shape; given: the tokens that a request gives of its answer, BLANK where it gives none.
    """
    is_given = given != BLANK
    return given.where(is_given, argmax), given.where(is_given, sampled), entropy.masked_fill(is_given, 0.0)


def put_given_embeddings(
    given: torch.Tensor, soft_embeds: torch.Tensor, embedding: torch.Tensor, embed_scale: float
) -> torch.Tensor:
    """As `put_given`, of soft embeddings [..., D] `dtype`: `soft_embeddings` of a token with probability 1 is its embedding,
    scaled. embedding: [V, D] `dtype`, embed_scale: see there."""
    of_given = _scaled(embedding[given.clamp(min=0)], embed_scale)
    return of_given.where((given != BLANK).unsqueeze(-1), soft_embeds)


class Convergence(NamedTuple):
    """Which rows are done, and the one number a row that `converged` needs back at the next step."""

    converged: torch.Tensor  # [B] bool
    stable_steps: torch.Tensor  # [B] int64: steps in a row, this one included, that repeated the argmax canvas before them


def converged(
    argmax_canvas: torch.Tensor,
    entropy: torch.Tensor,
    *,
    previous_argmax_canvas: torch.Tensor,
    stable_steps: torch.Tensor,
    stability_threshold: torch.Tensor,
    confidence_threshold: torch.Tensor,
) -> Convergence:
    """A row has converged when it is stable and confident.

    argmax_canvas: [B, C] int64; entropy: [B, C] float32, nats; stability_threshold: [B] integer, 0 is always stable;
    confidence_threshold: [B] float32, nats. The caller owns the state, one entry a row, so rows join and leave at any step: the
    argmax canvas of the step before and `stable_steps` from there. A row's first step starts from NO_CANVAS everywhere and 0.

    1. stable: the argmax canvas equals those of the `stability_threshold` steps before. They are all equal where each equals
       the one before it, so a count replaces the history.
    2. confident: the mean entropy is below `confidence_threshold`.
    """
    repeated = (argmax_canvas == previous_argmax_canvas).all(dim=-1)
    stable_steps = torch.where(repeated, stable_steps + 1, 0)
    stable = stable_steps >= stability_threshold  # 1.
    confident = entropy.mean(dim=-1) < confidence_threshold  # 2.
    return Convergence(stable & confident, stable_steps)


def _scaled(embeddings: torch.Tensor, embed_scale: float) -> torch.Tensor:
    return embeddings * torch.full((), embed_scale, dtype=torch.float32, device=embeddings.device).to(embeddings.dtype)


def _rows_of(each: Repetition | LogitBias, first: int) -> slice:
    """In a block of rows of the chunk that begins with `first`."""
    return slice(max(each.first_row - first, 0), max(each.end_row - first, 0))


# Logits that a CPU core works on at a time: on one EPYC core (1 MiB L2), a row of [97, 262144] takes 2.2 ms in such blocks and
# 3.7 ms in one piece.
_CPU_BLOCK_LOGITS = 1 << 18


def _row_blocks(logits: torch.Tensor) -> Iterator[tuple[int, int]]:
    """First and end rows of blocks: all rows at once, on a CPU as many as fit its caches.

    No block is one row of several: the threads would split its sums among them, and round them otherwise.
    """
    num_rows, vocab_size = logits.shape
    block_rows = num_rows
    if logits.device.type == "cpu":
        block_rows = max(2, torch.get_num_threads() * _CPU_BLOCK_LOGITS // vocab_size)
    first = 0
    while first < num_rows:
        end = num_rows if num_rows - first <= block_rows + 1 else first + block_rows
        yield first, end
        first = end
