"""The kernels of filters and log probabilities at the real vocabulary on a GPU: checked against plain PyTorch, then timed.

The floor is one read of the logits at the copy bandwidth measured in the same run. How often a kernel reads them depends on
the request and on the distribution: flat rows, as random weights give them, draw more often than rows that are sure of a token.
The last line is JSON.
"""

from collections.abc import Iterator
from functools import cache, partial

import torch
from kernels import VOCAB, Case, Maker, benchmark

from backend import noise, sampler
from backend.logit_filters import filtered_sample
from backend.logprobs import top_logprobs
from plugins.vocabulary.filters import filter_samples
from plugins.vocabulary.launch import vocabulary_pass
from plugins.vocabulary.logprobs import record_logprobs
from plugins.vocabulary.tables import Adjustment, Filters, LogprobTables

CHECKED_ROWS, CANVAS, MOST, CAP, TEMPERATURE = 32, 256, 20, 30.0, 0.6
FLAT, PEAKED = 0.5, 6.0  # deviations of the logits


@cache
def problem(rows: int, deviation: float) -> dict[str, object]:
    """Logits, what goes with them, the pass over them, and the plain one over the first rows."""
    logits = (torch.randn(rows, VOCAB, device="cuda") * deviation).bfloat16()
    each = torch.arange(rows, device="cuda")
    drawn = {"seeds": each * 977, "canvas_indices": each * 0, "steps": each * 0, "positions": each % CANVAS}
    processing = {"cap": CAP, "temperature": torch.full((rows,), TEMPERATURE, device="cuda")}
    greedy = torch.zeros(rows, dtype=torch.bool, device="cuda")
    random = noise.gumbel_noise_rows(*(value[:CHECKED_ROWS] for value in drawn.values()), VOCAB)
    some = {"cap": CAP, "temperature": processing["temperature"][:CHECKED_ROWS]}
    return {
        "logits": logits,
        "drawn": drawn,
        "processing": {**processing, "adjustment": Adjustment.none(logits)},
        "result": vocabulary_pass(logits, greedy=greedy, **processing, **drawn),
        "noise": random,
        "plain": sampler.vocabulary_pass(logits[:CHECKED_ROWS], noise=random, **some),
    }


def filters_case(rows: int, deviation: float, **filters: float) -> Case:
    """The error is the part of the tokens that the plain filters do not give."""
    given = problem(rows, deviation)
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    tables = Filters(*(torch.full((rows,), value, device="cuda") for value in {**off, **filters}.values()))
    sampled, result = given["result"].sampled.clone(), given["result"]
    arguments = {"argmax": result.argmax, **given["processing"], **given["drawn"]}
    filter_samples(given["logits"], sampled, tables, **arguments)
    expected = filtered_sample(given["plain"].processed, given["noise"], **filters)

    def run() -> None:
        filter_samples(given["logits"], sampled.copy_(result.sampled), tables, **arguments)

    return Case(
        name=f"{filters}, {rows} rows, " + ("flat" if deviation == FLAT else "peaked"),
        calls=[run] * 4,
        flops=0,
        bytes=2 * rows * VOCAB,
        error=(sampled[:CHECKED_ROWS] != expected).float().mean().item(),
        max_error=0,
    )


def logprobs_case(rows: int, deviation: float, count: int) -> Case:
    """The error is that of the values: of tokens that are equal in bfloat16, as many are, either may come."""
    given = problem(rows, deviation)
    slots, result = -(-rows // CANVAS), given["result"]
    tables = LogprobTables.empty(slots, CANVAS, MOST, "cuda")
    tables.counts[:] = count
    slot_of_rows = torch.arange(rows, device="cuda") // CANVAS
    processing = {**given["processing"], "adjustment": given["processing"]["adjustment"]._replace(slots=slot_of_rows)}
    arguments = {"argmax": result.argmax, "logprob": result.logprob, "positions": given["drawn"]["positions"]}
    run = partial(record_logprobs, given["logits"], tables, **arguments, **processing)
    run()
    plain = given["plain"]
    _, expected = top_logprobs(plain.processed, plain.argmax, plain.logprob, count)
    actual = tables.values[0, :CHECKED_ROWS, :count]
    return Case(
        name=f"{count} log probabilities, {rows} rows, " + ("flat" if deviation == FLAT else "peaked"),
        calls=[run] * 4,
        flops=0,
        bytes=2 * rows * VOCAB,
        error=((actual - expected).norm() / expected.norm()).item(),
        max_error=1e-5,
    )


def makers() -> Iterator[Maker]:
    for rows in (256, 1024):
        for deviation in (PEAKED, FLAT):
            for filters in ({}, {"min_p": 0.05}, {"top_p": 0.95}, {"top_k": 64}, {"top_k": 64, "top_p": 0.95}):
                yield partial(filters_case, rows, deviation, **filters)
            for count in (0, 5, 20):
                yield partial(logprobs_case, rows, deviation, count)


if __name__ == "__main__":
    benchmark("extras_kernels", __doc__, makers(), lambda maker: iter(()), (problem,))
