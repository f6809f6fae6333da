"""How the attention kernels are launched: arguments, grid, tile.

`attention` is the whole operator. See the package's docstring for its arguments. Everything here works on CUDA tensors, on meta
tensors (to describe and compile), and on CPU tensors in Triton's interpreter.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from plugins.attention.kernel import paged_attention_kernel
from plugins.attention.split_kernel import combine_kernel, paged_attention_split_kernel
from plugins.triton_launch import HOPPER_SHARED_BYTES, Launch, Wrap, least, shared_bytes, unwrapped


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program computes: query rows x columns of the output, over `keys` at a time; and how it is pipelined."""

    rows: int
    keys: int
    columns: int
    num_warps: int
    num_stages: int


NARROW_ROWS, NARROW_KEYS, NARROW_WARPS, NARROW_STAGES = 128, 32, 8, 3
"""Up to head_dim 256, where it takes 163,840 bytes of shared memory. NVIDIA H200, Triton 3.6, window 1024, 256-token canvases
of 16 / 4 / 1 sequences: 226 / 59 / 56 µs (1 in 4 splits: 31); 64 rows x 16 keys, 4 warps, 4 stages: 310 / 81 / 54 µs (36); 64 x
32, 4 warps, 3 stages: 328 / 84 / 42 µs (32 in 2 splits); 128 x 64, 8 warps, 2 stages: 257 / 69 / 67 µs (34)."""

WIDE = Tile(rows=128, keys=32, columns=256, num_warps=8, num_stages=2)
"""head_dim 512: 229,376 bytes of shared memory. The accumulator of all columns, over 64 rows, would take every register of 8
warps, and the two halves of the warps would compute the same scores. So a program makes half of the columns: the scores are
computed twice as well, but keys and values are read for twice as many rows. NVIDIA H200, Triton 3.6, prefix 8192, 256-token
canvases of 4 / 1 sequences: 1173 / 585 µs (1 in 2 splits: 309, in 3: 411, in 4: 319); 128 x 16, 3 stages: 1398 / 698 µs (371);
64 x 32 x 256, 4 warps, 3 stages: 1643 / 415 µs (422); 64 x 16 x 512, 3 stages: 2097 / 1049 µs (543)."""

SMALL = Tile(rows=64, keys=16, columns=256, num_warps=4, num_stages=2)
"""For GPUs of less shared memory: it takes 92,224 bytes with head_dim 512, 67,712 in three stages with 256. Not measured."""

FLOAT32_ROWS = 16
"""For comparisons in float32, which has no tensor cores of full precision. Not meant to be quick."""

MAX_SPLITS = 8
"""The most programs that share a tile's keys: what `combine_kernel` holds of a row at once."""

HOPPER_MULTIPROCESSORS = 132
"""Of the H100 SXM and the H200: programs are compiled on machines without one."""

_COMBINE_ROWS, _COMBINE_WARPS = 2, 2
"""NVIDIA H200, Triton 3.6, head_dim 256, 4 splits of one canvas: 4.0 µs; 4 warps: 8.5; 4 rows: 8.7; 1 row: 4.0; 8 rows, 8 warps: 23."""  # noqa: E501
_MIN_SPLIT_KEYS = 256


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
    """The operator. `num_splits` programs share the keys of a tile of queries; their results are then combined.

    tile: another than `choose_tile`'s, to compare them.
    """
    inputs = contiguous((query, new_kv, kv_pages, page_table, prefix_lengths, sequence_starts, image_block_ids))
    if isinstance(num_splits, int) and num_splits == 1:
        (output,) = attention_launch(inputs, causal, window, tile).run(wrap)
        return output
    partial, log_weights = split_launch(inputs, causal, window, num_splits, tile).run(wrap)
    (output,) = combine_launch(partial, log_weights, query.dtype).run(wrap)
    return output


def contiguous(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The operator's tensors as its kernels take them."""
    kv_pages = inputs[2]
    if not kv_pages.is_contiguous():
        raise ValueError(f"kv_pages: got strides {kv_pages.stride()}, expected a contiguous tensor (it is too large to copy)")
    return tuple(each.contiguous() for each in inputs)


def attention_launch(inputs: tuple[Tensor, ...], causal: bool, window: int, tile: Tile | None = None) -> Launch:
    """inputs: the operator's seven tensors, contiguous. Outputs [T, H, D]."""
    query = inputs[0]
    tile = tile or choose_tile(query.shape[2], query.dtype, shared_bytes(query))
    return tiled_launch(paged_attention_kernel, inputs, causal, window, tile, (torch.empty_like(query),))


def split_launch(inputs: tuple[Tensor, ...], causal: bool, window: int, num_splits: int, tile: Tile | None = None) -> Launch:
    """Outputs partial [splits, T, H, D] and log_weights [splits, T, H], float32, for `combine_launch`."""
    query = inputs[0]
    tile = tile or choose_tile(query.shape[2], query.dtype, shared_bytes(query))
    partial = query.new_empty(num_splits, *query.shape, dtype=torch.float32)
    outputs = (partial, query.new_empty(partial.shape[:-1], dtype=torch.float32))
    return tiled_launch(paged_attention_split_kernel, inputs, causal, window, tile, outputs, num_splits)


def combine_launch(partial: Tensor, log_weights: Tensor, dtype: torch.dtype) -> Launch:
    """Outputs [T, H, D] `dtype`."""
    num_splits, num_tokens, num_heads, head_dim = partial.shape
    num_rows = num_tokens * num_heads
    most = triton.next_power_of_2(num_splits) if isinstance(num_splits, int) else MAX_SPLITS
    return Launch(
        kernel=combine_kernel,
        grid=((num_rows + _COMBINE_ROWS - 1) // _COMBINE_ROWS,),
        inputs=(partial, log_weights),
        scalars=(num_rows, num_splits),
        outputs=(partial.new_empty(partial.shape[1:], dtype=dtype),),
        constants={"HEAD_DIM": head_dim, "BLOCK_ROWS": _COMBINE_ROWS, "MAX_SPLITS": most},
        num_warps=_COMBINE_WARPS,
        num_stages=2,
    )


def choose_num_splits(inputs: tuple[Tensor, ...], window: int, num_multiprocessors: int) -> int:
    """As many splits as fill the device once, none of much less than 256 keys.

    A split costs 8 bytes an element of the output, written and read again, so none is made where the tiles alone fill the
    device. The page table's width bounds the prefixes: their lengths are on the device. Of symbolic sizes: symbolic, but
    1 where the fewest tokens that there can be fill the device.
    """
    query, new_kv, kv_pages, page_table, *_ = inputs
    tile = choose_tile(query.shape[2], query.dtype, shared_bytes(query))
    tokens = tile.rows // (query.shape[1] // new_kv.shape[2])

    def room(num_tokens: int) -> int:
        num_programs = torch.sym_max(num_tokens // tokens, 1) * new_kv.shape[2] * (query.shape[2] // tile.columns)
        return num_multiprocessors // num_programs

    if room(least(query.shape[0])) <= 1:
        return 1
    max_prefix = page_table.shape[1] * kv_pages.shape[1]
    max_keys = (torch.sym_min(max_prefix, window) if window else max_prefix) + query.shape[0]
    useful = torch.sym_min(max_keys // _MIN_SPLIT_KEYS, MAX_SPLITS)
    return torch.sym_max(1, torch.sym_min(room(query.shape[0]), useful))


def choose_tile(head_dim: int, dtype: torch.dtype, shared: int = HOPPER_SHARED_BYTES) -> Tile:
    """The tile of a layer's kernel. shared: bytes of shared memory that one program may have."""
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(f"attention kernel: got head_dim {head_dim}, expected a power of two of at least 16")
    if dtype == torch.float32:
        return Tile(rows=FLOAT32_ROWS, keys=16, columns=min(head_dim, 256), num_warps=8, num_stages=1)
    if dtype != torch.bfloat16:
        raise ValueError(f"attention kernel: got {dtype}, expected torch.bfloat16 or torch.float32")
    if shared < HOPPER_SHARED_BYTES:
        return replace(SMALL, columns=min(head_dim, 256), num_stages=3 if head_dim <= 256 else 2)
    if head_dim > 256:
        return WIDE
    return Tile(rows=NARROW_ROWS, keys=NARROW_KEYS, columns=head_dim, num_warps=NARROW_WARPS, num_stages=NARROW_STAGES)


def tiled_launch(
    kernel: object,
    inputs: tuple[Tensor, ...],
    causal: bool,
    window: int,
    tile: Tile,
    outputs: tuple[Tensor, ...],
    num_splits: int | None = None,
) -> Launch:
    """Programs along rows, along heads and columns and, of a kernel that knows splits, along these."""
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
    splits = () if num_splits is None else (num_splits,)
    return Launch(
        kernel=kernel,
        grid=(*grid, *splits),
        inputs=inputs,
        scalars=(*page_table.shape, num_tokens, kv_pages.shape[0], *splits),
        outputs=outputs,
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
