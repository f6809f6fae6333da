"""The attention kernel for Hopper equals its reference, as Python on the CPU: see `gluon_interpreter.py`.

Memory that must not be read is NaN, or outside of a tensor: an error.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="the kernel is written in Triton's Gluon")

from gluon_interpreter import InterpretedKernel
from test_plugins import attention_inputs, behind
from tolerances import assert_close

from plugins.attention.hopper_launch import choose_tile, hopper_launch
from plugins.attention.reference import paged_attention_reference
from plugins.batch_invariance import CUT_TOKENS

SLIDING = {"heads": 4, "kv_heads": 2, "head_dim": 256, "page_size": 32}
FULL = {"heads": 8, "kv_heads": 1, "head_dim": 512, "page_size": 32}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def interpreted(inputs, causal, window, num_splits=1, keys=None):
    tile = choose_tile(inputs[0].shape[2])
    launch = hopper_launch(inputs, causal, window, num_splits, dataclasses.replace(tile, keys=keys or tile.keys))
    result, log_weights = dataclasses.replace(launch, kernel=InterpretedKernel(launch.kernel)).run()
    if num_splits == 1:
        return result[0]
    weights = torch.exp2(log_weights - log_weights.amax(0))  # as `combine_kernel`
    return ((weights[..., None] * result).sum(0) / weights.sum(0)[..., None]).bfloat16()


def check(inputs, causal, window, **options):
    inputs[0].mul_(0.2)  # scores of a few units, so that many keys count
    actual = interpreted(inputs, causal, window, **options)
    assert_close(actual, paged_attention_reference(*inputs, causal, window), torch.bfloat16)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [SLIDING, FULL], ids=["sliding", "full"])
@pytest.mark.parametrize(
    "case",
    [
        {"prefixes": [0], "counts": [1]},
        {"prefixes": [1, 64], "counts": [63, 64]},
        {"prefixes": [300, 0, 128, 97], "counts": [5, 1, 70, 130]},
    ],
    ids=str,
)
def test_prefixes_and_lengths(case, sizes, causal):
    window = 100 if sizes is SLIDING else 0
    check(attention_inputs(**case, window=window, **sizes, images=causal, dtype=torch.bfloat16), causal, window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_splits", [2, 7])
@pytest.mark.parametrize(("sizes", "window"), [(SLIDING, 100), (FULL, 0)], ids=["sliding", "full"])
def test_splits_of_the_keys(sizes, window, num_splits, causal):
    """Also where a split has no keys at all, and where none are cached."""
    inputs = attention_inputs(prefixes=[200, 1, 0], counts=[33, 2, 70], window=window, **sizes, dtype=torch.bfloat16)
    check(inputs, causal, window, num_splits=num_splits)


@pytest.mark.parametrize("page_size", [8, 16, 64, 256])
def test_page_sizes(page_size):
    """Below and above a block of keys: pages within a block, or blocks within a page."""
    sizes = {**SLIDING, "page_size": page_size}
    check(attention_inputs(prefixes=[200, 67], counts=[40, 2], window=90, **sizes, dtype=torch.bfloat16), False, 90)


@pytest.mark.parametrize("keys", [32, 64])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks(causal, keys):
    inputs = attention_inputs(prefixes=[150, 31], counts=[65, 9], window=70, **SLIDING, images=causal, dtype=torch.bfloat16)
    check(inputs, causal, 70, keys=keys)


def test_every_place_of_a_window_in_its_blocks():
    """Every key weighs the same and has a column of its own, so that each one that is seen by mistake, or is not, shows."""
    sizes = {"heads": 2, "kv_heads": 1, "head_dim": 256, "page_size": 32}
    for window in range(96, 128):
        inputs = attention_inputs(prefixes=[70], counts=[186], window=window, **sizes, dtype=torch.bfloat16)
        query, new_kv, kv_pages, page_table, *_ = inputs
        own = torch.eye(256, dtype=torch.bfloat16)
        query.zero_()
        for position in range(70):
            value = kv_pages[page_table[0, position // 32], position % 32, 1, 0]
            if not value.isnan().any():  # else it left the window
                value.copy_(own[position])
        new_kv[:, 1, 0] = own[70:]
        check(inputs, True, window)


@pytest.mark.parametrize(("sizes", "window"), [(SLIDING, 100), (FULL, 0)], ids=["sliding", "full"])
def test_a_row_is_the_same_wherever_its_prompt_is_cut(sizes, window):
    """An image is among the tokens, so that a tile looks at more new keys in a longer pass."""
    inputs = attention_inputs(prefixes=[0], counts=[300], window=window, **sizes, images=True, dtype=torch.bfloat16)
    whole = interpreted(inputs, True, window)
    for cut in (CUT_TOKENS, 3 * CUT_TOKENS):
        assert torch.equal(interpreted(behind(inputs, cut), True, window), whole[cut:])
    assert not torch.equal(interpreted(behind(inputs, 200), True, window), whole[200:])
    assert CUT_TOKENS % choose_tile(sizes["head_dim"]).keys == 0


@pytest.mark.parametrize("window", [0, 8])
def test_images_see_each_other_beyond_their_tile_and_the_window(window):
    """The first image spans tiles of query rows and is longer than the window; another sequence reuses its number."""
    inputs = attention_inputs(prefixes=[20, 3], counts=[200, 20], window=window, **SLIDING, dtype=torch.bfloat16)
    images = inputs[-1]
    images[40:140], images[145:147], images[205:215] = 0, 1, 0
    images[198] = 1
    check(inputs, True, window)


def test_groups_that_are_no_power_of_two():
    sizes = {"heads": 6, "kv_heads": 1, "head_dim": 256, "page_size": 32}
    check(attention_inputs(prefixes=[35], counts=[50], window=0, **sizes, dtype=torch.bfloat16), True, 0)


def test_many_sequences_some_of_them_empty():
    """More sequences than the search for a tile's sequence reads at once."""
    counts = [int(i in (2, 63, 64)) + int(i == 69) * 2 for i in range(70)]
    prefixes = [(7 * i) % 20 for i in range(70)]
    check(attention_inputs(prefixes=prefixes, counts=counts, window=16, **SLIDING, dtype=torch.bfloat16), False, 16)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("made_up", ["page_table", "prefix_lengths", "sequence_starts", "image_block_ids", "all of them"])
def test_made_up_indices_read_nothing_outside(made_up, causal):
    inputs = attention_inputs(prefixes=[40, 0], counts=[20, 33], window=32, **SLIDING, dtype=torch.bfloat16)
    names = ["page_table", "prefix_lengths", "sequence_starts", "image_block_ids"]
    for low, high in ((-(2**31), 2**31), (-(2**31), 0), (2**20, 2**31)):
        others = [
            torch.randint(low, high, each.shape).int() if made_up in (name, "all of them") else each
            for name, each in zip(names, inputs[3:], strict=True)
        ]
        assert interpreted((*inputs[:3], *others), causal, 32).shape == inputs[0].shape
