"""How the tokens of one encode pass are shared among the rows that wait for it: prompts, and canvases to be committed.

1. The row that has waited longest gets up to half of the pass, so that every row gets on, whatever comes after it.
2. The rest goes to the rows with the fewest tokens left first, so that a commit (at most one canvas) and a short prompt are not
   held up by a long prompt: they go with the next pass, and the long prompt goes on with what they leave.
3. The tokens of an image, which see each other both ways, go in one pass: a row's part ends before an image rather than within
   it. Only the row that has waited longest gets one that is larger than its half, so that it gets on too; such a pass may be
   larger than was meant.

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


def share_encode_budget(
    tokens_left: Sequence[int],
    waiting_since: Sequence[int],
    budget: int,
    images_left: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> list[int]:
    """Tokens of the next pass for each row, at most the row's tokens_left. In all they are at most `budget`, or as many as the
    first image of the row that has waited longest.

    waiting_since: a number that orders the rows by when they began to wait; of equals the first row is the oldest.
    images_left: for each row the images among its tokens_left, ascending: (first token, token behind the last one).
    """
    shares = [0] * len(tokens_left)
    if not shares:
        return shares
    images = images_left or [()] * len(shares)
    oldest = min(range(len(shares)), key=waiting_since.__getitem__)
    first_image = next((end for start, end in images[oldest] if start == 0), 0)  # 3.
    shares[oldest] = _uncut(max(min(tokens_left[oldest], -(-budget // 2)), first_image), images[oldest])  # 1.
    budget = max(0, budget - shares[oldest])
    for row in sorted(range(len(shares)), key=tokens_left.__getitem__):  # 2.
        more = _uncut(min(tokens_left[row], shares[row] + budget), images[row]) - shares[row]
        shares[row] += more
        budget -= more
    return shares


def _uncut(count: int, images: Sequence[tuple[int, int]]) -> int:
    """The most tokens up to `count` that end in no image."""
    return next((start for start, end in images if start < count < end), count)
