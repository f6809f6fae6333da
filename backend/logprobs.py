"""Log probabilities of a canvas's argmax tokens and of the most likely alternatives, as they were at its last step."""

import torch

from backend.job import TokenLogprob

_IMPOSSIBLE = -1e5
"""`FORBIDDEN`, divided by any temperature, is below it; what is above has a probability of 0 in every format."""


class CanvasLogprobs:
    """One canvas's, overwritten at every step. C canvas length, K alternatives (at most V).

    The distribution is softmax(processed): bias and temperature are in it, top-k, top-p and min-p are not.
    """

    def __init__(self, canvas_length: int, num_alternatives: int, device: torch.device):
        self._logprob = torch.zeros(canvas_length, dtype=torch.float32, device=device)
        self._token_ids = torch.zeros(canvas_length, num_alternatives, dtype=torch.int64, device=device)
        self._top = torch.zeros(canvas_length, num_alternatives, dtype=torch.float32, device=device)

    def record(self, positions: slice, processed: torch.Tensor, argmax: torch.Tensor, logprob: torch.Tensor) -> None:
        """Takes the step's values of some positions: processed [R, V] float32, argmax [R], logprob [R] of the argmax."""
        self._logprob[positions] = logprob
        if self._top.shape[1]:
            token_ids, values = top_logprobs(processed, argmax, logprob, self._top.shape[1])
            self._token_ids[positions], self._top[positions] = token_ids, values

    def tolist(self) -> list[TokenLogprob]:
        return token_logprobs(self._logprob, self._token_ids, self._top)


def token_logprobs(logprob: torch.Tensor, token_ids: torch.Tensor, values: torch.Tensor) -> list[TokenLogprob]:
    """Of each position of a canvas: [C], and the K alternatives' [C, K], of which those that a grammar forbids are left out."""
    alternatives = [
        [(token_id, value) for token_id, value in zip(*each, strict=True) if value > _IMPOSSIBLE]
        for each in zip(token_ids.tolist(), values.tolist(), strict=True)
    ]
    return [TokenLogprob(*each) for each in zip(logprob.tolist(), alternatives, strict=True)]


def top_logprobs(
    processed: torch.Tensor, argmax: torch.Tensor, logprob: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` most likely tokens of each row and their log softmax(processed), falling: [R, count] int64 and float32.

    The argmax comes first, also where others equal it; among the others, equals are in the order the device leaves them.
    """
    best = processed.gather(-1, argmax[:, None])
    token_ids = processed.scatter(-1, argmax[:, None], torch.inf).topk(count, dim=-1).indices
    return token_ids, processed.gather(-1, token_ids) - best + logprob[:, None]
