"""Asks the programs of a batch-invariant engine, when it is loaded, whether they are: which kernels PyTorch's library has for
how many rows is its own affair, of its version and of the GPU. See `plugins.batch_invariance`.
"""

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from backend.kv_cache import PagedKVCache
from backend.session import Session
from contract.manifest import ManifestError
from plugins.batch_invariance import PASS_ROWS

_CACHED_TOKENS = 100  # of canvases, in pages that are no slot's
_Passes = Iterator[tuple[int, list[Tensor]]]
"""Of each pass its rows, and what it gave the same few of them."""


def check_batch_invariance(session: Session, cache: PagedKVCache, *, batches: Iterable[int], head_rows: int) -> None:
    """Runs every program with the same rows alone, then before and behind ever more others.

    batches: canvases that a step may have. head_rows: the most rows that the head gets at once.

    Raises:
        ManifestError: they are not the same, bit for bit; or a canvas has no room for its logits.
    """
    if head_rows < session.manifest.model.canvas_length:
        raise ManifestError(
            f"batch_invariant: got room for {head_rows} rows of logits, expected as many as a canvas has, "
            f"{session.manifest.model.canvas_length}; raise sampler_workspace_bytes"
        )
    passes = {
        "encode": _encoded(session, cache),
        "denoise": _denoised(session, cache, batches),
        "head": _logits(session, head_rows),
    }
    for program, passes_of_program in passes.items():
        least, alone = next(passes_of_program)
        for num_rows, among_others in passes_of_program:
            if not all(torch.equal(*pair) for pair in zip(among_others, alone, strict=True)):
                raise ManifestError(
                    f"batch_invariant: program {program} gives rows among {num_rows} other bits than among {least}, with "
                    f"PyTorch {torch.__version__} on this device; build the engine without --batch-invariant"
                )


def _encoded(session: Session, cache: PagedKVCache) -> _Passes:
    """Keys and values of a sequence's first PASS_ROWS tokens."""
    most = session.manifest.build.max_encode_tokens
    tokens, int32 = _random_tokens(session, most), {"dtype": torch.int32}
    for num_rows in range(PASS_ROWS, most + 1, PASS_ROWS):
        for begin in sorted({0, num_rows - PASS_ROWS}):
            starts = sorted({0, begin, begin + PASS_ROWS, num_rows})
            lengths = [end - start for start, end in itertools.pairwise(starts)]
            new_kv = session.encode(
                tokens[:num_rows].roll(begin),
                torch.cat([torch.arange(length, **int32) for length in lengths]),
                torch.tensor(starts, **int32),
                torch.zeros(len(lengths), **int32),
                _tables(cache, len(lengths)),
            )
            yield num_rows, [each[begin : begin + PASS_ROWS] for each in new_kv]


def _denoised(session: Session, cache: PagedKVCache, batches: Iterable[int]) -> _Passes:
    """Hidden states of a canvas, first and last of its pass."""
    model, device = session.manifest.model, session.device
    length, sizes = model.canvas_length, sorted({1, *batches})
    canvases = _random_tokens(session, sizes[-1] * length).view(-1, length).to(device)
    soft_embeds = _random_rows(session, length).expand(sizes[-1], -1, -1).contiguous()
    for batch in sizes:
        own_last = torch.cat([canvases[: batch - 1], canvases[:1]])
        prefix_lengths = torch.full((batch,), _CACHED_TOKENS, dtype=torch.int32, device=device)
        hidden = session.denoise(own_last, soft_embeds[:batch], prefix_lengths, _tables(cache, batch))
        yield batch * length, [hidden[0], hidden[-1]]


def _logits(session: Session, head_rows: int) -> _Passes:
    """Of a canvas, first and last of its rows."""
    length = session.manifest.model.canvas_length
    own = _random_rows(session, length)
    for num_rows in range(length, head_rows + 1, length):
        logits = session.head(own.repeat(num_rows // length, 1))
        yield num_rows, [logits[:length].clone(), logits[-length:].clone()]


def _tables(cache: PagedKVCache, num_rows: int) -> dict[str, Tensor]:
    columns = -(-_CACHED_TOKENS // cache.page_size)
    return {kind: table[-1:, :columns].repeat(num_rows, 1) for kind, table in cache.device_tables.items()}


def _random_tokens(session: Session, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(session.manifest.model.vocab_size, (count,), generator=generator, dtype=torch.int32)


def _random_rows(session: Session, count: int) -> Tensor:
    rows = torch.randn(count, session.manifest.model.hidden_size, generator=torch.Generator().manual_seed(0))
    return rows.to(session.dtype).to(session.device)
