"""The attention and sampler kernels compile for Hopper at the real model's shapes, on a machine without a GPU.

Run with `-s` to see registers, shared memory and instructions of each.
"""

from collections.abc import Iterable

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from hopper import (
    check_compiles,
    check_exponentials_are_spread,
    check_factors_stay_until_they_are_read,
    described_adjustment,
)

from backend.encode_pass import pass_sizes
from plugins.attention import hopper_launch
from plugins.attention.launch import (
    attention_launch,
    choose_num_splits,
    choose_tile,
    combine_launch,
    split_launch,
)
from plugins.vocabulary import launch as vocabulary

LAYERS = {"sliding": {"kv_heads": 8, "head_dim": 256, "window": 1024}, "full": {"kv_heads": 2, "head_dim": 512, "window": 0}}
HEADS, PAGE_SIZE, CANVAS_LENGTH, VOCAB_SIZE = 16, 32, 256, 262144


def attention_inputs(
    *, kv_heads, head_dim, tokens=256, sequences=1, columns=256, page_size=PAGE_SIZE, dtype=torch.bfloat16, device="meta"
):
    def tensor(*shape: int, of: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device=device)

    new_kv = tensor(tokens, 2, kv_heads, head_dim, of=dtype)
    kv_pages = tensor(sequences * columns, page_size, 2, kv_heads, head_dim, of=dtype)
    lengths = (tensor(sequences, columns), tensor(sequences), tensor(sequences + 1))
    return (tensor(tokens, HEADS, head_dim, of=dtype), new_kv, kv_pages, *lengths, tensor(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["denoise", "encode"])
@pytest.mark.parametrize("layer", LAYERS)
def test_attention_compiles(layer, causal, dtype, tmp_path):
    sizes = dict(LAYERS[layer])
    window = sizes.pop("window")
    launch = attention_launch(attention_inputs(**sizes, dtype=dtype), causal, window)
    instructions = check_compiles(launch, tmp_path, f"{layer}, {'encode' if causal else 'denoise'}, {dtype}")
    if dtype == torch.bfloat16:
        assert instructions["wgmma.mma_async"] and instructions["cp.async.cg"]
        check_factors_stay_until_they_are_read(tmp_path / "kernel.cubin")
        check_exponentials_are_spread(tmp_path / "kernel.cubin")


def test_attention_of_the_vision_tower_compiles(tmp_path):
    """A square image; its heads of 72 are filled up, its own keys and values stand for pages of one token."""
    query, new_kv, *_, block_ids = attention_inputs(kv_heads=HEADS, head_dim=128, tokens=256 * 9)
    zero, both = (torch.empty(count, dtype=torch.int32, device="meta") for count in (1, 2))
    inputs = (query, new_kv, new_kv.unsqueeze(1), zero.unsqueeze(1), zero, both, block_ids)
    assert check_compiles(attention_launch(inputs, False, 0), tmp_path, "vision")["wgmma.mma_async"]


@pytest.mark.parametrize("causal", [False, True], ids=["denoise", "encode"])
@pytest.mark.parametrize("layer", LAYERS)
def test_split_attention_compiles(layer, causal, tmp_path):
    sizes = dict(LAYERS[layer])
    window = sizes.pop("window")
    split = split_launch(attention_inputs(**sizes), causal, window, 4)
    check_compiles(split, tmp_path, f"{layer}, {'encode' if causal else 'denoise'}, split")
    check_factors_stay_until_they_are_read(tmp_path / "kernel.cubin")
    check_exponentials_are_spread(tmp_path / "kernel.cubin")
    check_compiles(combine_launch(*split.outputs, torch.bfloat16), tmp_path, layer)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("causal", [False, True], ids=["denoise", "encode"])
@pytest.mark.parametrize("layer", LAYERS)
def test_attention_for_hopper_compiles(layer, causal, num_splits, tmp_path):
    """Threads that encode with heads of 256 have ten numbers too many, of which a turn of a loop, 840 instructions, stores and
    loads five. On an H200, with Triton 3.6, that takes four fifths of the time of blocks of 32 keys, which need no memory."""
    sizes = dict(LAYERS[layer])
    window = sizes.pop("window")
    launch = hopper_launch.hopper_launch(attention_inputs(**sizes), causal, window, num_splits)
    title = f"{layer}, {'encode' if causal else 'denoise'}, {num_splits} splits"
    spilled = 40 if causal and layer == "sliding" else 0
    instructions = check_compiles(launch, tmp_path, title, groups=3, spilled=spilled)
    assert instructions["wgmma.mma_async"] and instructions["cp.async.cg"]
    check_factors_stay_until_they_are_read(tmp_path / "kernel.cubin")


@pytest.mark.parametrize("page_size", [8, 64])
def test_attention_for_hopper_compiles_for_other_pages(page_size, tmp_path):
    inputs = attention_inputs(kv_heads=2, head_dim=512, page_size=page_size)
    check_compiles(hopper_launch.hopper_launch(inputs, False, 0, 1), tmp_path, f"pages of {page_size}", groups=3)


def test_layers_with_a_kernel_for_hopper():
    def has_kernel(head_dim=256, page_size=32, dtype=torch.bfloat16):
        return hopper_launch.has_kernel(attention_inputs(kv_heads=8, head_dim=head_dim, page_size=page_size, dtype=dtype))

    assert all(has_kernel(head_dim=head_dim, page_size=size) for head_dim in (256, 512) for size in (8, 16, 32, 256))
    assert not has_kernel(head_dim=128) and not has_kernel(dtype=torch.float32)
    assert not has_kernel(page_size=4) and not has_kernel(page_size=24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_vocabulary_pass_compiles(dtype, tmp_path):
    def rows(of: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(CANVAS_LENGTH, dtype=of, device="meta")

    logits = torch.empty(CANVAS_LENGTH, VOCAB_SIZE, dtype=dtype, device="meta")
    adjustment = described_adjustment(5, VOCAB_SIZE, CANVAS_LENGTH)
    tile = vocabulary.tile_launch((logits, rows(torch.float32), *adjustment, rows(torch.bool), *[rows()] * 4), 30.0)
    assert check_compiles(tile, tmp_path, str(dtype))["ld.global.v4"]
    check_compiles(vocabulary.merge_launch(*tile.outputs), tmp_path, str(dtype))


def test_acceptance_compiles(tmp_path):
    def sequences(*length: int, of: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(4, *length, dtype=of, device="meta")

    numbers = {"entropy": sequences(CANVAS_LENGTH, of=torch.float32), "bound": sequences(of=torch.float32)}
    canvas = sequences(CANVAS_LENGTH)
    of_the_step = (numbers["entropy"], canvas, canvas, numbers["bound"], numbers["bound"])
    inputs = (*of_the_step, canvas, *[sequences()] * 5)
    check_compiles(vocabulary.acceptance_launch(inputs, VOCAB_SIZE), tmp_path, f"canvas {CANVAS_LENGTH}")


def test_grids_at_the_real_sizes():
    sliding = attention_inputs(kv_heads=8, head_dim=256, tokens=4 * 256, sequences=4)
    full = attention_inputs(kv_heads=2, head_dim=512, tokens=4 * 256, sequences=4)
    assert attention_launch(sliding, False, 1024).grid == (1024 // 64 + 4, 8)
    assert attention_launch(full, False, 0).grid == (1024 // 16 + 4, 2 * 2)
    assert split_launch(full, False, 0, 3).grid == (1024 // 16 + 4, 2 * 2, 3)


@pytest.mark.parametrize(
    ("tokens", "prefix", "window", "expected"),
    [
        (1024, 65536, 0, 1),
        (512, 65536, 0, 1),
        (256, 65536, 0, 2),
        (128, 65536, 0, 4),
        (1, 65536, 0, 8),
        (1, 1024, 0, 4),
        (1, 32, 0, 1),
    ],
)
def test_splits_fill_the_device(tokens, prefix, window, expected):
    """H200: 132 multiprocessors. A canvas has 16 tiles of 4 programs each."""
    inputs = attention_inputs(kv_heads=2, head_dim=512, tokens=tokens, columns=prefix // PAGE_SIZE)
    assert choose_num_splits(inputs, window, 132) == expected


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("multiprocessors", [78, 114, 132])
def test_passes_when_an_engine_is_loaded_have_every_kind_of_splits(layer, multiprocessors):
    """No pass of a request has results of another power of two to be combined, whatever its tokens and its page table."""
    kv_heads, head_dim, window = LAYERS[layer].values()

    def kinds(tokens: Iterable[int], widths: Iterable[int]) -> set[int]:
        sizes = {"kv_heads": kv_heads, "head_dim": head_dim}
        inputs = (attention_inputs(tokens=each, columns=width, **sizes) for each in tokens for width in widths)
        splits = {choose_num_splits(each, window, multiprocessors) for each in inputs}
        return {(each - 1).bit_length() for each in splits}

    assert kinds(range(16, 2049, 16), (1, 8, 16, 32, 64, 128, 2048)) <= kinds(pass_sizes(2048, []), [2048])


@pytest.mark.parametrize(("tokens", "prefix", "expected"), [(256, 65536, 4), (256, 256, 2), (1024, 65536, 1), (1, 65536, 4)])
def test_splits_of_a_window(tokens, prefix, expected):
    """A canvas has 4 tiles of 8 programs each, over 1024 + 256 keys at most."""
    inputs = attention_inputs(kv_heads=8, head_dim=256, tokens=tokens, columns=prefix // PAGE_SIZE)
    assert choose_num_splits(inputs, 1024, 132) == expected


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [(48, torch.bfloat16, "got head_dim 48, expected a power of two"), (64, torch.float16, "expected torch.bfloat16 or")],
)
def test_shapes_without_a_kernel_are_refused(head_dim, dtype, message):
    with pytest.raises(ValueError, match=message):
        choose_tile(head_dim, dtype)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="got 16 query heads and 3 key/value heads, expected a multiple"):
        attention_launch(attention_inputs(kv_heads=3, head_dim=256), False, 0)
