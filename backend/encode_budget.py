"""How the tokens of one encode pass are shared among the rows that wait for it: prompts, and canvases to be committed.

1. The row that has waited longest gets up to half of the pass, so that every row gets on, whatever comes after it.
2. The rest goes to the rows with the fewest tokens left first, so that a commit (at most one canvas) and a short prompt are not
   held up by a long prompt: they go with the next pass, and the long prompt goes on with what they leave.

While canvases are being denoised, each step waits for the pass before it. The pass is then no larger than the step, counted in
rows, or an eighth of the largest pass if that is more: a step takes about twice its time at most, and prompts still get on.
"""

from collections.abc import Sequence

_LEAST_PART = 8


def encode_budget(max_encode_tokens: int, num_canvas_rows: int) -> int:
    """Tokens of the next pass. num_canvas_rows: positions of the canvases that are being denoised, 0 without any."""
    if not num_canvas_rows:
        return max_encode_tokens
    return min(max_encode_tokens, max(num_canvas_rows, max_encode_tokens // _LEAST_PART, 1))


def share_encode_budget(tokens_left: Sequence[int], waiting_since: Sequence[int], budget: int) -> list[int]:
    """Tokens of the next pass for each row, at most `budget` in all and at most the row's tokens_left.

    waiting_since: a number that orders the rows by when they began to wait; of equals the first row is the oldest.
    """
    shares = [0] * len(tokens_left)
    if not shares:
        return shares
    oldest = min(range(len(shares)), key=waiting_since.__getitem__)
    shares[oldest] = min(tokens_left[oldest], -(-budget // 2))  # 1.
    budget -= shares[oldest]
    for row in sorted(range(len(shares)), key=tokens_left.__getitem__):  # 2.
        more = min(tokens_left[row] - shares[row], budget)
        shares[row] += more
        budget -= more
    return shares
