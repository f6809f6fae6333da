"""Tiles to try in a sweep, beside those that the product chooses."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from plugins.attention.hopper_launch import choose_tile as hopper_tile
from plugins.attention.launch import Tile as AttentionTile
from plugins.moe.arranged_launch import arranged_tile
from plugins.moe.launch import Tile


def plain_tiles(num_rows: int) -> Iterator[Tile]:
    """Of the experts' products with weights as a checkpoint has them."""
    for rows, width, num_warps, stages, weights_first in (
        (32, 128, 4, (3, 4, 5), True),
        (32, 128, 4, (4,), False),
        (32, 256, 8, (3, 4), True),
        (64, 128, 4, (3, 4), False),
        (64, 128, 4, (3, 4), True),
        (128, 128, 8, (3, 4), False),
        (128, 256, 8, (3, 4), False),
    ):
        if rows >= num_rows // 16:
            for each in stages:
                yield Tile(rows=rows, width=width, depth=64, num_warps=num_warps, num_stages=each, weights_first=weights_first)


def arranged_tiles(num_rows: int, fp8_rows: bool = False) -> Iterator[Tile]:
    """Of those with arranged weights. fp8_rows: see `plugins.moe.arranged_launch.arranged_tile`."""
    depths = (64, 128) if fp8_rows else (64,)
    sizes = ((64, 4, (2, 3, 4, 6)), (128, 4, (2, 3, 4, 6)), (128, 8, (3, 4)), (256, 4, (3, 4)), (256, 8, (2, 3)))
    for width, num_warps, stages in sizes:
        if width == 256 and fp8_rows:
            continue
        for rows in (32, 64, 128):
            if rows >= num_rows // 16 or rows == 128:
                yield from (arranged_tile(rows, width, num_warps, *each) for each in itertools.product(stages, depths))


def attention_tiles(head_dim: int, hopper: bool) -> Iterator[AttentionTile]:
    """hopper: of the kernel for it, of which only the keys of a block can be chosen."""
    if hopper:
        for keys in (32, 64) if head_dim == 256 else (32,):
            yield replace(hopper_tile(head_dim), keys=keys)
        return
    tiles = {
        256: ((64, 16, 256, 4, 4), (64, 32, 256, 4, 3), (128, 32, 256, 8, 3), (128, 64, 256, 8, 2)),
        512: ((128, 16, 256, 8, 3), (128, 32, 256, 8, 2), (64, 32, 256, 4, 3)),
    }
    for rows, keys, columns, num_warps, stages in tiles[head_dim]:
        yield AttentionTile(rows=rows, keys=keys, columns=columns, num_warps=num_warps, num_stages=stages)
