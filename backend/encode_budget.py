"""How the tokens of one encode pass are shared among the rows that wait for it: prompts, and canvases to be committed.

1. The row that has waited longest gets up to half of the pass, so that every row gets on, whatever comes after it.
2. The rest goes to the rows with the fewest tokens left first, so that a commit (at most one canvas) and a short prompt are not
   held up by a long prompt: they go with the next pass, and the long prompt goes on with what they leave.
3. The tokens of an image, which see each other both ways, go in one pass: a row's part ends before an image rather than within
   it. Only the row that has waited longest gets one that is larger than its half, so that it gets on too; such a pass may be
   larger than was meant.

While canvases are being denoised, each step waits for the pass before it. The pass is then no larger than the step, counted in
rows, or an eighth of the largest pass if that is more: a step takes about twice its time at most, and prompts still get on.

A batch-invariant engine cuts prompts at multiples of a number of tokens, and canvases not at all (`plugins.batch_invariance`):
a row's part ends at the last such place, and the one that has waited longest gets at least its tokens up to the first. What
cannot be cut goes before what can, and where a canvas is to be committed there is room for one. Images with no such place
between them go in one pass, all of them.
"""

from collections.abc import Sequence

from backend.job import Job
from contract.manifest import BuildConfig
from plugins.batch_invariance import CUT_TOKENS

_LEAST_PART = 8

Spans = Sequence[tuple[int, int]]
"""What is in one pass whole, ascending: (first token, token behind the last one), counted from the row's next token."""


def next_pass(waiting: Sequence[Job], num_canvas_rows: int, build: BuildConfig) -> list[tuple[Job, int]]:
    """Who goes with the next pass, with how many tokens. num_canvas_rows: see `encode_budget`."""
    budget, multiple = encode_budget(build.max_encode_tokens, num_canvas_rows), 1
    uncut: list[Spans] = [job.images_left for job in waiting]
    if build.batch_invariant:
        multiple = CUT_TOKENS
        canvases = [job.num_pending for job in waiting if job.canvas_index]
        uncut = [[(0, job.num_pending)] if job.canvas_index else spans for job, spans in zip(waiting, uncut, strict=True)]
        budget = min(build.max_encode_tokens, max(budget, *(2 * each for each in canvases), CUT_TOKENS))
    pending, since = [job.num_pending for job in waiting], [job.waiting_since for job in waiting]
    shares = share_encode_budget(pending, since, budget, uncut, multiple)
    return [(job, share) for job, share in zip(waiting, shares, strict=True) if share]


def one_for_a_step(waiting: Sequence[Job], canvas_length: int) -> Job | None:
    """The row whose tokens may go with a denoising step, after which it waits for none: where it is the only one, and these are
    text, no more than a canvas. Of several, one pass for all takes less than a step of each with its own."""
    [job] = waiting if len(waiting) == 1 else [None]
    return job if job and job.num_pending <= canvas_length and not (job.images_left or job.ended) else None


def most_in_one_pass(num_tokens: int, images: Spans, build: BuildConfig) -> int:
    """Of a prompt's tokens: those of its largest image, or of images with the text that stays with them."""
    multiple = CUT_TOKENS if build.batch_invariant else 1
    most = start = end = 0
    for first, behind in images:
        if first - first % multiple >= end:  # it may be cut before this image
            start = first - first % multiple
        end = min(-(-behind // multiple) * multiple, num_tokens)
        most = max(most, end - start)
    return most


def encode_budget(max_encode_tokens: int, num_canvas_rows: int) -> int:
    """Tokens of the next pass. num_canvas_rows: positions of the canvases that are being denoised, 0 without any."""
    if not num_canvas_rows:
        return max_encode_tokens
    return min(max_encode_tokens, max(num_canvas_rows, max_encode_tokens // _LEAST_PART, 1))


def share_encode_budget(
    tokens_left: Sequence[int],
    waiting_since: Sequence[int],
    budget: int,
    uncut: Sequence[Spans] | None = None,
    multiple: int = 1,
) -> list[int]:
    """Tokens of the next pass for each row, at most the row's tokens_left. In all they are at most `budget`, or as many as the
    row that has waited longest has up to the first place where it may be cut.

    waiting_since: a number that orders the rows by when they began to wait; of equals the first row is the oldest. uncut: for
    each row what of its tokens_left is not cut. multiple: rows are cut after multiples of so many tokens.
    """
    shares = [0] * len(tokens_left)
    if not shares:
        return shares
    spans = uncut or [()] * len(shares)
    oldest = min(range(len(shares)), key=waiting_since.__getitem__)
    first = _first_cut(tokens_left[oldest], spans[oldest], multiple)  # 3.
    shares[oldest] = max(_last_cut(-(-budget // 2), tokens_left[oldest], spans[oldest], multiple), first)  # 1.
    budget = max(0, budget - shares[oldest])

    def order(row: int) -> tuple[bool, int]:
        left = tokens_left[row]
        can_be_cut = _first_cut(left, spans[row], multiple) < left
        return can_be_cut, left if can_be_cut else -left  # a short prompt fits behind a canvas, but not the other way about

    for row in sorted(range(len(shares)), key=order):  # 2.
        more = _last_cut(shares[row] + budget, tokens_left[row], spans[row], multiple) - shares[row]
        shares[row] += more
        budget -= more
    return shares


def _last_cut(count: int, tokens_left: int, uncut: Spans, multiple: int) -> int:
    """The most tokens up to `count` after which a row may be cut; 0 if that is before its first one."""
    if count >= tokens_left:
        return tokens_left
    count -= count % multiple
    for start, end in reversed(uncut):
        if start < count < end:
            count = start - start % multiple
    return count


def _first_cut(tokens_left: int, uncut: Spans, multiple: int) -> int:
    """The fewest tokens after which a row may be cut."""
    count = min(multiple, tokens_left)
    for start, end in uncut:
        if start < count < end:
            count = min(-(-end // multiple) * multiple, tokens_left)
    return count
