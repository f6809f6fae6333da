"""Triton-language kernels that order routed rows by expert: one kernel for few, three for many.

See `plugins.moe.kernel` for the shape legend and for what shapes the signatures.

| kernel | inputs | scalars | outputs | a program computes |
|---|---|---|---|---|
| align | top_k_index [N, k] | num_routed, num_tiles | row_order [slots], tile_expert [tiles] | one expert |
| count | top_k_index [N, k] | num_routed | counts [chunks, E] | one chunk of CHUNK routed rows |
| scan | counts | num_chunks | first_slots as counts, totals [E], end_tiles [E] | COLUMNS experts |
| place | top_k_index, first_slots, totals, end_tiles | num_routed, num_tiles | row_order, tile_expert | one chunk |

The order is the same: by expert, each expert's routed rows in their own order; every tile's expert, -1 of tiles that no expert
has. It needs no zeroed memory and no atomics, and is the same in every run. Indices that are no expert's are left out.
"""

# ruff: noqa: N803 - constants are in capitals

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("num_routed", "num_tiles"))
def align_kernel(
    top_k_index,
    num_routed,
    num_tiles,
    row_order,
    tile_expert,
    NUM_EXPERTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
):
    """1. Count every expert's routed rows. 2. Find this expert's first tile. 3. Place its routed rows. 4. Fill its last tile.
    5. Name its tiles. 6. The last expert's program marks the tiles that no expert has.

    Every program reads the whole index: of few rows it is small, and a second kernel would take longer.
    """
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS_POW2)
    block = tl.arange(0, BLOCK)
    # 1.
    counts = tl.zeros((EXPERTS_POW2,), dtype=tl.int32)
    for start in range(0, num_routed, BLOCK):
        routed = start + block
        index = tl.load(top_k_index + routed, mask=routed < num_routed, other=-1).to(tl.int32)
        counts += tl.histogram(index, EXPERTS_POW2, mask=(index >= 0) & (index < NUM_EXPERTS))
    # 2.
    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), axis=0)
    end_tile = first_tile + tl.sum(tl.where(experts == expert, tiles, 0), axis=0)
    # 3.
    slot = first_tile * TILE_ROWS
    for start in range(0, num_routed, BLOCK):
        routed = start + block
        index = tl.load(top_k_index + routed, mask=routed < num_routed, other=-1).to(tl.int32)
        mine = (index == expert).to(tl.int32)
        tl.store(row_order + slot + tl.cumsum(mine, axis=0) - 1, routed, mask=mine > 0)
        slot += tl.sum(mine, axis=0)
    # 4.
    _fill(row_order, slot, end_tile * TILE_ROWS, num_routed, TILE_ROWS)
    # 5.
    _name(tile_expert, first_tile, end_tile, expert, BLOCK)
    # 6.
    if expert == NUM_EXPERTS - 1:
        _name(tile_expert, end_tile, num_tiles, -1, BLOCK)


@triton.jit(do_not_specialize=("num_routed",))
def count_kernel(top_k_index, num_routed, counts, NUM_EXPERTS: tl.constexpr, CHUNK: tl.constexpr, EXPERTS_POW2: tl.constexpr):
    """How many of the chunk's routed rows each expert has."""
    routed = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    index = tl.load(top_k_index + routed, mask=routed < num_routed, other=-1).to(tl.int32)
    count = tl.histogram(index, EXPERTS_POW2, mask=(index >= 0) & (index < NUM_EXPERTS))
    tl.store(counts + tl.program_id(0) * EXPERTS_POW2 + tl.arange(0, EXPERTS_POW2), count)


@triton.jit(do_not_specialize=("num_chunks",))
def scan_kernel(
    counts,
    num_chunks,
    first_slots,
    totals,
    end_tiles,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
):
    """1. Sum the counts of all experts. 2. Find the last tile of each, and so the first slot of the program's experts. 3. Sum
    their counts over the chunks before each, BLOCK chunks at a time.
    """
    experts = tl.arange(0, EXPERTS_POW2)
    own = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.arange(0, BLOCK)
    # 1.
    total = tl.zeros((EXPERTS_POW2,), dtype=tl.int32)
    for start in range(0, num_chunks, BLOCK):
        chunk = (start + block)[:, None]
        total += tl.sum(tl.load(counts + chunk * EXPERTS_POW2 + experts[None, :], mask=chunk < num_chunks, other=0), axis=0)
    # 2.
    tiles = (total + TILE_ROWS - 1) // TILE_ROWS
    end_tile = tl.cumsum(tiles, axis=0)
    mine = (experts // COLUMNS) == tl.program_id(0)
    tl.store(totals + experts, total, mask=mine)
    tl.store(end_tiles + experts, end_tile, mask=mine)
    first_slot = (end_tile - tiles) * TILE_ROWS
    slot = tl.sum(tl.where(experts[:, None] == own[None, :], first_slot[:, None], 0), axis=0)
    # 3.
    for start in range(0, num_chunks, BLOCK):
        chunk = (start + block)[:, None]
        count = tl.load(counts + chunk * EXPERTS_POW2 + own[None, :], mask=chunk < num_chunks, other=0)
        before = slot[None, :] + tl.cumsum(count, axis=0) - count
        tl.store(first_slots + chunk * EXPERTS_POW2 + own[None, :], before, mask=chunk < num_chunks)
        slot += tl.sum(count, axis=0)


@triton.jit(do_not_specialize=("num_routed", "num_tiles"))
def place_kernel(
    top_k_index,
    first_slots,
    totals,
    end_tiles,
    num_routed,
    num_tiles,
    row_order,
    tile_expert,
    NUM_EXPERTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
):
    """1. Place the chunk's routed rows: each after those before it that have the same expert, BLOCK compared at a time. 2. Of
    a share of the experts fill the last tile and name the tiles. 3. The last program marks the tiles that no expert has.
    """
    chunk, num_chunks = tl.program_id(0), tl.num_programs(0)
    within = tl.arange(0, CHUNK)
    # 1.
    routed = chunk * CHUNK + within
    index = tl.load(top_k_index + routed, mask=routed < num_routed, other=-1).to(tl.int32)
    placed = (index >= 0) & (index < NUM_EXPERTS)
    slot = tl.load(first_slots + chunk * EXPERTS_POW2 + index, mask=placed, other=0)
    for start in range(0, CHUNK, BLOCK):
        other = start + tl.arange(0, BLOCK)
        others = tl.load(top_k_index + chunk * CHUNK + other, mask=chunk * CHUNK + other < num_routed, other=-1).to(tl.int32)
        # Of the same expert and earlier: numbered by expert and place, from the expert's first number up to the own one.
        distance = (others * CHUNK + other)[None, :] - (index * CHUNK)[:, None]
        slot += tl.sum((distance.to(tl.uint32, bitcast=True) < within[:, None].to(tl.uint32)).to(tl.int32), axis=1)
    tl.store(row_order + slot, routed, mask=placed)
    # 2.
    for expert in range(chunk, NUM_EXPERTS, num_chunks):
        total, end = tl.load(totals + expert), tl.load(end_tiles + expert)
        first = end - (total + TILE_ROWS - 1) // TILE_ROWS
        _fill(row_order, first * TILE_ROWS + total, end * TILE_ROWS, num_routed, TILE_ROWS)
        _name(tile_expert, first, end, expert, EXPERTS_POW2)
    # 3.
    if chunk == num_chunks - 1:
        _name(tile_expert, tl.load(end_tiles + NUM_EXPERTS - 1), num_tiles, -1, EXPERTS_POW2)


@triton.jit
def _fill(row_order, slot, end_slot, num_routed, TILE_ROWS: tl.constexpr):
    """The slots of an expert's last tile, from `slot` on, hold no routed row."""
    slots = slot + tl.arange(0, TILE_ROWS)
    tl.store(row_order + slots, tl.zeros((TILE_ROWS,), dtype=tl.int32) + num_routed, mask=slots < end_slot)


@triton.jit
def _name(tile_expert, first, end, expert, BLOCK: tl.constexpr):
    """The tiles from `first` to `end` are the expert's."""
    for start in range(first, end, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        tl.store(tile_expert + tile, tl.zeros((BLOCK,), dtype=tl.int32) + expert, mask=tile < end)
