"""How routed rows are ordered by expert: `aligned` is the stage; see `plugins.moe.alignment_kernel`."""

import torch
import triton
from torch import Tensor

from plugins.moe import alignment_kernel
from plugins.triton_launch import Launch, Wrap, ceil_div, least, unwrapped

MANY_ROUTED = 16384
"""From here on in chunks. NVIDIA H200, Triton 3.6, 1024 / 2048 / 4096 / 8192 / 16384 rows of 8 experts: 13.3 / 13.0 / 13.4 /
15.9 / 27.6 µs, at once: 10.7 / 17.9 / 36.1 / 70.7 / 139."""

_ALIGN_BLOCK, _ALIGN_WARPS = 2048, 8
"""NVIDIA H200, Triton 3.6, 256 / 8192 rows: 3.9 / 74 µs; 4 warps: 4.5 / 96; blocks of 1024: 4.3 / 96; of 4096: 5.5 / 66."""

_CHUNK, _COMPARED, _CHUNK_WARPS = 256, 32, 8
"""NVIDIA H200, Triton 3.6, `place` at 4096 / 16384 rows: 6.0 / 14.9 µs; 4 warps: 7.1 / 14.9; chunks of 128: 4.4 / 7.9, but
`scan` 12.7 / 47; of 512: 17 / 33."""

_SCANNED, _SCAN_COLUMNS, _SCAN_WARPS = 256, 16, 8
"""NVIDIA H200, Triton 3.6, `scan` at 4096 / 16384 rows: 6.1 / 10.9 µs; 64 chunks at a time: 7.3 / 24.2."""


def aligned(top_k_index: Tensor, num_experts: int, tile_rows: int, wrap: Wrap = unwrapped) -> tuple[Tensor, Tensor]:
    """The outputs of `align`. top_k_index: [N, k], contiguous; of a symbolic N the fewest that it can be count."""
    if least(top_k_index.shape[0] * top_k_index.shape[1]) < MANY_ROUTED:
        return align(top_k_index, num_experts, tile_rows).run(wrap)
    (counts,) = count(top_k_index, num_experts).run(wrap)
    scanned = scan(counts, tile_rows).run(wrap)
    return place(top_k_index, *scanned, num_experts, tile_rows).run(wrap)


def num_tiles(num_routed: int, num_experts: int, tile_rows: int) -> int:
    """The most tiles that the routed rows can need: every expert's last tile may hold a single one."""
    return (num_routed + num_experts * (tile_rows - 1)) // tile_rows


def align(top_k_index: Tensor, num_experts: int, tile_rows: int) -> Launch:
    """Outputs row_order [tiles * tile_rows] int32 and tile_expert [tiles] int32; slots of unused tiles stay undefined."""
    num_routed = top_k_index.shape[0] * top_k_index.shape[1]
    tiles = num_tiles(num_routed, num_experts, tile_rows)
    return Launch(
        kernel=alignment_kernel.align_kernel,
        grid=(num_experts,),
        inputs=(top_k_index,),
        scalars=(num_routed, tiles),
        outputs=_slots_and_tiles(top_k_index, tiles, tile_rows),
        constants={
            "NUM_EXPERTS": num_experts,
            "TILE_ROWS": tile_rows,
            "BLOCK": _ALIGN_BLOCK,
            "EXPERTS_POW2": triton.next_power_of_2(num_experts),
        },
        num_warps=_ALIGN_WARPS,
        num_stages=1,
    )


def _slots_and_tiles(top_k_index: Tensor, tiles: int, tile_rows: int) -> tuple[Tensor, Tensor]:
    return tuple(top_k_index.new_empty(size, dtype=torch.int32) for size in (tiles * tile_rows, tiles))


def count(top_k_index: Tensor, num_experts: int, chunk: int = _CHUNK) -> Launch:
    """Outputs counts [chunks, E] int32, E here and below filled up to a power of two."""
    num_routed, experts = top_k_index.shape[0] * top_k_index.shape[1], triton.next_power_of_2(num_experts)
    num_chunks = ceil_div(num_routed, chunk)
    return Launch(
        kernel=alignment_kernel.count_kernel,
        grid=(num_chunks,),
        inputs=(top_k_index,),
        scalars=(num_routed,),
        outputs=(top_k_index.new_empty(num_chunks, experts, dtype=torch.int32),),
        constants={"NUM_EXPERTS": num_experts, "CHUNK": chunk, "EXPERTS_POW2": experts},
        num_warps=_CHUNK_WARPS,
        num_stages=1,
    )


def scan(counts: Tensor, tile_rows: int) -> Launch:
    """Outputs first_slots as counts, totals [E] and end_tiles [E], all int32."""
    num_chunks, experts = counts.shape
    columns = min(_SCAN_COLUMNS, experts)
    return Launch(
        kernel=alignment_kernel.scan_kernel,
        grid=(experts // columns,),
        inputs=(counts,),
        scalars=(num_chunks,),
        outputs=(torch.empty_like(counts), counts.new_empty(experts), counts.new_empty(experts)),
        constants={"TILE_ROWS": tile_rows, "BLOCK": _SCANNED, "COLUMNS": columns, "EXPERTS_POW2": experts},
        num_warps=_SCAN_WARPS,
        num_stages=1,
    )


def place(
    top_k_index: Tensor,
    first_slots: Tensor,
    totals: Tensor,
    end_tiles: Tensor,
    num_experts: int,
    tile_rows: int,
    chunk: int = _CHUNK,
) -> Launch:
    """Outputs as `align`."""
    num_routed = top_k_index.shape[0] * top_k_index.shape[1]
    tiles = num_tiles(num_routed, num_experts, tile_rows)
    return Launch(
        kernel=alignment_kernel.place_kernel,
        grid=(first_slots.shape[0],),
        inputs=(top_k_index, first_slots, totals, end_tiles),
        scalars=(num_routed, tiles),
        outputs=_slots_and_tiles(top_k_index, tiles, tile_rows),
        constants={
            "NUM_EXPERTS": num_experts,
            "TILE_ROWS": tile_rows,
            "CHUNK": chunk,
            "BLOCK": min(chunk, _COMPARED),
            "EXPERTS_POW2": totals.shape[0],
        },
        num_warps=_CHUNK_WARPS,
        num_stages=1,
    )
