"""How the attention kernels are launched: arguments, grid, tile.

`attention` is the whole operator. See the package's docstring for its arguments. Everything here works on CUDA tensors, on meta
tensors (to describe and compile), and on CPU tensors in Triton's interpreter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from plugins.attention.kernel import paged_attention_kernel
from plugins.attention.split_kernel import combine_kernel, paged_attention_split_kernel
from plugins.triton_launch import Launch, Wrap, unwrapped


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program computes: query rows x columns of the output, over `keys` at a time; and how it is pipelined."""

    rows: int
    keys: int
    columns: int
    num_warps: int
    num_stages: int


# The bfloat16 tiles are chosen by what Triton 3.7 and its ptxas 12.9 make of them for sm_90a at the model's sizes: no spills,
# and three stages or more, because with two the copies of a block start only when the one before it is done with. No device was
# timed. Others without spills, to compare: 128 x 32, 8 warps, 3 stages (head_dim 256) or 2 stages (head_dim 512).
NARROW_ROWS, NARROW_KEYS, NARROW_WARPS, NARROW_STAGES = 64, 16, 4, 4
"""Up to head_dim 256: two programs share a multiprocessor, with 98,496 bytes of shared memory each at head_dim 256."""

WIDE = Tile(rows=128, keys=16, columns=256, num_warps=8, num_stages=3)
"""head_dim 512: 204,928 bytes. The accumulator of all columns, over 64 rows, would take every register of 8 warps, and the two
halves of the warps would compute the same scores. So a program makes half of the columns: the scores are computed twice as
well, but by twice as many programs."""

FLOAT32_ROWS = 16
"""For comparisons in float32, which has no tensor cores of full precision. Not meant to be quick."""

_COMBINE_ROWS = 4
_MIN_SPLIT_KEYS = 4096


def attention(
    query: Tensor,
    new_kv: Tensor,
    kv_pages: Tensor,
    page_table: Tensor,
    prefix_lengths: Tensor,
    sequence_starts: Tensor,
    image_block_ids: Tensor,
    causal: bool,
    window: int,
    *,
    num_splits: int = 1,
    tile: Tile | None = None,
    wrap: Wrap = unwrapped,
) -> Tensor:
    """The operator. `num_splits` programs share the cached keys of a tile of queries; their results are then combined.

    tile: another than `choose_tile`'s, to compare them.
    """
    if not kv_pages.is_contiguous():
        raise ValueError(f"kv_pages: got strides {kv_pages.stride()}, expected a contiguous tensor (it is too large to copy)")
    per_token = (query.contiguous(), new_kv.contiguous())
    indices = (page_table, prefix_lengths, sequence_starts, image_block_ids)
    inputs = (*per_token, kv_pages, *(each.contiguous() for each in indices))
    if num_splits == 1:
        (output,) = attention_launch(inputs, causal, window, tile).run(wrap)
        return output
    partial, log_weights = split_launch(inputs, causal, window, num_splits, tile).run(wrap)
    (output,) = combine_launch(partial, log_weights, query.dtype).run(wrap)
    return output


def attention_launch(inputs: tuple[Tensor, ...], causal: bool, window: int, tile: Tile | None = None) -> Launch:
    """inputs: the operator's seven tensors, contiguous. Outputs [T, H, D]."""
    query, _, _, page_table, *_ = inputs
    tile = tile or choose_tile(query.shape[2], query.dtype)
    grid, constants = _tiling(inputs, causal, window, tile)
    return Launch(
        kernel=paged_attention_kernel,
        grid=grid,
        inputs=inputs,
        scalars=tuple(page_table.shape),
        outputs=(torch.empty_like(query),),
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def split_launch(inputs: tuple[Tensor, ...], causal: bool, window: int, num_splits: int, tile: Tile | None = None) -> Launch:
    """Outputs partial [splits, T, H, D] and log_weights [splits, T, H], float32, for `combine_launch`."""
    query, _, _, page_table, *_ = inputs
    tile = tile or choose_tile(query.shape[2], query.dtype)
    grid, constants = _tiling(inputs, causal, window, tile)
    partial = query.new_empty(num_splits, *query.shape, dtype=torch.float32)
    return Launch(
        kernel=paged_attention_split_kernel,
        grid=(*grid, num_splits),
        inputs=inputs,
        scalars=(*page_table.shape, query.shape[0]),
        outputs=(partial, query.new_empty(partial.shape[:-1], dtype=torch.float32)),
        constants=constants | {"NUM_SPLITS": num_splits},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def combine_launch(partial: Tensor, log_weights: Tensor, dtype: torch.dtype) -> Launch:
    """Outputs [T, H, D] `dtype`."""
    num_splits, num_tokens, num_heads, head_dim = partial.shape
    num_rows = num_tokens * num_heads
    return Launch(
        kernel=combine_kernel,
        grid=((num_rows + _COMBINE_ROWS - 1) // _COMBINE_ROWS,),
        inputs=(partial, log_weights),
        scalars=(num_rows,),
        outputs=(partial.new_empty(partial.shape[1:], dtype=dtype),),
        constants={"HEAD_DIM": head_dim, "BLOCK_ROWS": _COMBINE_ROWS, "NUM_SPLITS": num_splits},
        num_warps=4,
        num_stages=2,
    )


def choose_num_splits(inputs: tuple[Tensor, ...], window: int, num_multiprocessors: int) -> int:
    """As many splits as fill the device once, none of much less than 4,096 keys.

    A split costs 8 bytes an element of the output, written and read again. Against that stand 4,096 keys' scores and values
    for every row, so the combination stays small. The page table's width bounds the prefixes: their lengths are on the device.
    """
    if window:
        return 1
    query, _, kv_pages, page_table, *_ = inputs
    (num_tiles, num_columns), _ = _tiling(inputs, False, window, choose_tile(query.shape[2], query.dtype))
    max_prefix = page_table.shape[1] * kv_pages.shape[1]
    return max(1, min(num_multiprocessors // max(num_tiles * num_columns, 1), max_prefix // _MIN_SPLIT_KEYS))


def choose_tile(head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of a layer's kernel."""
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(f"attention kernel: got head_dim {head_dim}, expected a power of two of at least 16")
    if dtype == torch.float32:
        return Tile(rows=FLOAT32_ROWS, keys=16, columns=min(head_dim, 256), num_warps=4, num_stages=1)
    if dtype != torch.bfloat16:
        raise ValueError(f"attention kernel: got {dtype}, expected torch.bfloat16 or torch.float32")
    if head_dim > 256:
        return WIDE
    return Tile(rows=NARROW_ROWS, keys=NARROW_KEYS, columns=head_dim, num_warps=NARROW_WARPS, num_stages=NARROW_STAGES)


def _tiling(inputs: tuple[Tensor, ...], causal: bool, window: int, tile: Tile) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs along rows and along heads and columns; the kernel's constants."""
    query, new_kv, kv_pages, page_table, *_ = inputs
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = new_kv.shape[2]
    group = num_heads // num_kv_heads
    if num_heads % num_kv_heads or group > tile.rows:
        raise ValueError(
            f"attention kernel: got {num_heads} query heads and {num_kv_heads} key/value heads, expected a multiple, at most "
            f"{tile.rows} times as many"
        )
    constants = {
        "CAUSAL": causal,
        "WINDOW": window,
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": kv_pages.shape[1],
        "BLOCK_ROWS": tile.rows,
        "BLOCK_KEYS": tile.keys,
        "BLOCK_VALUES": tile.columns,
    }
    grid = (num_tokens // (tile.rows // group) + page_table.shape[0], num_kv_heads * (head_dim // tile.columns))
    return grid, constants
