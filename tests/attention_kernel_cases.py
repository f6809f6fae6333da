"""The cases of `test_attention_kernels.py`, which runs this file in Triton's interpreter (TRITON_INTERPRET=1).

Memory that must not be read is NaN: slots that no row may see, and every output and scratch tensor before its kernel runs.
"""

import pytest
import torch
from test_plugins import attention_inputs, behind
from tolerances import assert_close
from triton_interpreter import let_dot_read_bfloat16, save_the_interpreters_time

from plugins.attention.launch import attention, choose_tile
from plugins.attention.reference import paged_attention_reference
from plugins.batch_invariance import CUT_TOKENS

let_dot_read_bfloat16()
save_the_interpreters_time()

DTYPES = [torch.float32, torch.bfloat16]
SMALL = {"heads": 4, "kv_heads": 2, "head_dim": 16, "page_size": 16}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(inputs, causal, window, dtype, **options):
    actual = attention(*inputs, causal, window, **options)
    assert_close(actual, paged_attention_reference(*inputs, causal, window), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        {"prefixes": [0], "counts": [1], "window": 0},
        {"prefixes": [1], "counts": [63], "window": 32},
        {"prefixes": [31], "counts": [33], "window": 32},
        {"prefixes": [32, 0, 500], "counts": [5, 1, 40], "window": 32},
        {"prefixes": [100, 33], "counts": [3, 70], "window": 0},
    ],
    ids=str,
)
def test_prefixes_and_lengths(case, causal, dtype):
    check(attention_inputs(**case, **SMALL, dtype=dtype), causal, case["window"], dtype)


@pytest.mark.parametrize(("head_dim", "window"), [(64, 40), (512, 0)])
def test_tiles_of_gpus_with_less_shared_memory(head_dim, window):
    sizes = SMALL | {"head_dim": head_dim, "page_size": 32}
    tile = choose_tile(head_dim, torch.bfloat16, 99 * 1024)
    assert tile != choose_tile(head_dim, torch.bfloat16)
    for causal in (True, False):
        inputs = attention_inputs(prefixes=[70, 3], counts=[41, 2], window=window, **sizes, dtype=torch.bfloat16)
        check(inputs, causal, window, torch.bfloat16, tile=tile, num_splits=1 + causal)


@pytest.mark.parametrize(("window", "causal"), [(64, True), (0, False)])
def test_257_new_tokens(window, causal):
    inputs = attention_inputs(prefixes=[70], counts=[257], window=window, **SMALL, dtype=torch.bfloat16)
    check(inputs, causal, window, torch.bfloat16)


@pytest.mark.parametrize("causal", [True, False])
def test_the_last_of_262144_positions(causal):
    """A window there, and one at the beginning beside it: 16,383 pages a sequence, in no order."""
    inputs = attention_inputs(prefixes=[262_128, 3], counts=[16, 5], window=40, **SMALL, dtype=torch.bfloat16)
    check(inputs, causal, 40, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 8, 32, 64])
def test_page_sizes(page_size, dtype):
    """Below, at and above a block of keys: pages within a block, or blocks within a page."""
    sizes = {**SMALL, "page_size": page_size}
    check(attention_inputs(prefixes=[67, 32], counts=[9, 2], window=40, **sizes, dtype=dtype), True, 40, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(6, 1, 32), (16, 2, 16), (2, 2, 16), (16, 8, 256), (16, 2, 512)])
def test_heads(heads, kv_heads, head_dim, dtype):
    """Groups that are no power of two, and the model's own two shapes."""
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": 32}
    check(attention_inputs(prefixes=[35], counts=[9], window=0, **sizes, dtype=dtype), True, 0, dtype)


@pytest.mark.parametrize("window", [0, 8])
def test_images_see_each_other_beyond_their_tile_and_the_window(window):
    """The first image spans tiles of query rows and is longer than the window; another sequence reuses its number."""
    inputs = attention_inputs(prefixes=[20, 3], counts=[60, 20], window=window, **SMALL)
    images = inputs[-1]
    images[10:40], images[45:47], images[65:75] = 0, 1, 0
    images[58] = 1
    check(inputs, True, window, torch.float32)


def test_many_sequences_some_of_them_empty():
    """More sequences than the search for a tile's sequence reads at once."""
    counts = [int(i in (2, 63, 64)) + int(i == 69) * 2 for i in range(70)]
    prefixes = [(7 * i) % 20 for i in range(70)]
    check(attention_inputs(prefixes=prefixes, counts=counts, window=16, **SMALL), False, 16, torch.float32)


@pytest.mark.parametrize(
    ("num_splits", "causal", "dtype"), [(2, True, torch.bfloat16), (2, False, torch.float32), (5, True, torch.bfloat16)]
)
def test_splits_of_the_keys(num_splits, causal, dtype):
    """Also where a split has no keys at all, and where none are cached."""
    inputs = attention_inputs(prefixes=[200, 1, 0], counts=[33, 2, 3], window=0, **SMALL, dtype=dtype)
    check(inputs, causal, 0, dtype, num_splits=num_splits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 100])
def test_a_row_is_the_same_wherever_its_prompt_is_cut(window, dtype):
    """An image is among the tokens, so that a tile looks at more new keys in a longer pass."""
    inputs = attention_inputs(prefixes=[0], counts=[300], window=window, **SMALL, images=True, dtype=dtype)
    whole = attention(*inputs, True, window)
    for cut in (CUT_TOKENS, 3 * CUT_TOKENS):
        assert torch.equal(attention(*behind(inputs, cut), True, window), whole[cut:])
    assert not torch.equal(attention(*behind(inputs, 200), True, window), whole[200:])
    tiles = [choose_tile(head_dim, kind) for head_dim in (256, 512) for kind in DTYPES]
    assert {CUT_TOKENS % tile.keys for tile in tiles} == {0}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_made_up_indices_read_nothing_outside(num_splits, causal):
    """A TensorRT builder times the kernel on such inputs; a read outside of them would end this process."""
    torch.manual_seed(0)
    inputs = attention_inputs(prefixes=[40, 0], counts=[20, 33], window=32, **SMALL, dtype=torch.float32)
    for _ in range(5):
        made_up = [torch.randint(-(2**31), 2**31, each.shape).int() for each in inputs[3:]]
        output = attention(*inputs[:3], *made_up, causal, 32 if num_splits == 1 else 0, num_splits=num_splits)
        assert output.shape == inputs[0].shape


@pytest.mark.parametrize("causal", [True, False])
def test_splits_of_a_window(causal):
    """The window's first key is within a block, and splits begin among the cached keys and among the new ones."""
    inputs = attention_inputs(prefixes=[300, 7], counts=[150, 5], window=90, **SMALL)
    inputs[-1][20:60] = 0 if causal else -1
    check(inputs, causal, 90, torch.float32, num_splits=3)
