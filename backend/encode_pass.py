"""One encode pass: new tokens of several sequences, packed, and their keys and values written behind what each sequence has.

Images among the tokens go through the vision program first, one by one. Each is in one pass whole, so it is looked at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from backend.images.preprocess import ImagePatches
from backend.job import Job
from backend.kv_cache import PagedKVCache
from backend.session import Session
from plugins.batch_invariance import PASS_ROWS
from plugins.moe.cpu import ROW_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """What a pass adds to the sequence in `slot`. page_keys: keys of its full pages, the new tokens' included. images: those
    among the tokens, each with the index of its first token."""

    slot: int
    token_ids: list[int]
    page_keys: Sequence[bytes]
    images: Sequence[tuple[int, ImagePatches]] = ()

    @classmethod
    def of(cls, job: Job, count: int) -> "NewTokens":
        """The first `count` pending tokens of a job."""
        return cls(slot=job.slot, token_ids=job.next_tokens(count), page_keys=job.page_keys, images=job.next_images(count))


def encode_new_tokens(session: Session, cache: PagedKVCache, packed: Sequence[NewTokens], *, keep_pages: bool) -> None:
    """Runs the pass; at most `max_encode_tokens` tokens in all. `keep_pages`: keep full pages for the prefix cache."""
    slots, counts = [each.slot for each in packed], [len(each.token_ids) for each in packed]
    lengths = [cache.length[slot] for slot in slots]
    starts = [sum(counts[:index]) for index in range(len(counts) + 1)]
    token_ids = [token for each in packed for token in each.token_ids]
    positions = [each for length, count in zip(lengths, counts, strict=True) for each in range(length, length + count)]
    # Filler behind the last sequence's tokens, which cannot see it; its keys and values are not written. With few rows
    # products on the CPU would round differently, with fewer than 200 also on a GPU.
    build = session.manifest.build
    multiple = PASS_ROWS if build.batch_invariant else ROW_MULTIPLE
    num_filler = min(-len(token_ids) % multiple, build.max_encode_tokens - len(token_ids))
    token_ids += [0] * num_filler
    positions += range(positions[-1] + 1, positions[-1] + 1 + num_filler)
    starts[-1] += num_filler
    int32 = {"dtype": torch.int32}
    new_kv = session.encode(
        torch.tensor(token_ids, **int32),
        torch.tensor(positions, **int32),
        torch.tensor(starts, **int32),
        torch.tensor(lengths, **int32),
        cache.tables(slots),
        *_image_inputs(session, packed, starts, len(token_ids)),
    )
    cache.append(slots, counts, new_kv, page_keys=[each.page_keys for each in packed] if keep_pages else None)


def _image_inputs(
    session: Session, packed: Sequence[NewTokens], starts: Sequence[int], num_tokens: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """image_embeds and image_index of `Session.encode`."""
    placed = [(start + first, image) for start, each in zip(starts, packed, strict=False) for first, image in each.images]
    if not placed:
        return None, None
    index, num_rows = torch.full((2, num_tokens), -1, dtype=torch.int32), 0
    for number, (first, image) in enumerate(placed):
        tokens = slice(first, first + image.num_soft_tokens)
        index[0, tokens] = torch.arange(num_rows, num_rows + image.num_soft_tokens, dtype=torch.int32)
        index[1, tokens] = number
        num_rows += image.num_soft_tokens
    return torch.cat([session.vision(image) for _, image in placed]), index


def warm_up(session: Session, cache: PagedKVCache) -> None:
    """Runs a pass of every kind once, so that no request waits for what is made when it is first used: kernels that are called
    by a program are compiled then, on Hopper four of attention, 4 s each. Nothing is cached, and what the passes give is
    dropped.
    """
    encode, most = session.manifest.programs["encode"], session.manifest.build.max_encode_tokens
    sizes = pass_sizes(most, (variant.minimum for variant in encode.variants))
    int32 = {"dtype": torch.int32}
    for num_tokens, columns in [(sizes[0], 1), *((size, None) for size in sizes)]:
        session.encode(
            torch.zeros(num_tokens, **int32),
            torch.arange(num_tokens, **int32),
            torch.tensor([0, num_tokens], **int32),
            torch.zeros(1, **int32),
            {kind: table[-1:, :columns].clone() for kind, table in cache.device_tables.items()},  # of no slot
        )


def pass_sizes(most: int, minimums: Iterable[int]) -> list[int]:
    """Tokens of passes over a long prefix, ascending, of which one is of every kind: at most `most`. minimums: of the program's
    variants.

    Few tokens have several programs share the keys, and kernels differ by the power of two that these are at most. Their number
    is inverse to that of the tokens, so sizes of which each is at most one and a half of the one before miss none.
    """
    fewest = min(ROW_MULTIPLE, most)
    doublings = [fewest << times for times in range((most // fewest).bit_length())]
    between = [each + each // 2 for each in doublings[1:]]
    return sorted({size for size in doublings + between if size <= most} | {most, *minimums})
