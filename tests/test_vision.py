"""The vision network against transformers' tower: image features, and keys and values of prompts with images."""

from unittest import mock

import numpy as np
import pytest
import torch
from oracles import Oracle
from PIL import Image
from small_checkpoints import VISION, network_session, random_checkpoint
from test_network import Passes, kept
from tolerances import assert_as_exact, assert_close

from backend.encode_pass import NewTokens, encode_new_tokens
from backend.images.placeholders import expand, image_spans
from backend.images.preprocess import preprocess

TOWERS = {
    "standardized": {},
    "plain": {"standardize": False},
    "clipped": {"use_clipped_linears": True},
    "grouped keys": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "other patches": {"patch_size": 8, "pooling_kernel_size": 3},
}
SIZES = [(100, 90), (30, 300), (500, 20)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Colours that vary over the image, and noise on them: no patch is like another."""
    noise = np.random.default_rng(seed).integers(0, 64, (height, width, 3))
    y, x = np.indices((height, width))
    slopes = np.stack([x * 191 // width, y * 191 // height, (x + y) * 191 // (width + height)], axis=-1)
    return Image.fromarray((noise + slopes).astype(np.uint8))


@pytest.mark.parametrize("tower", TOWERS)
def test_float32_features_equal_transformers(tower, tmp_path):
    checkpoint = random_checkpoint(tmp_path, vision=VISION | TOWERS[tower])
    oracle, session = Oracle(checkpoint), network_session(checkpoint, dtype="float32")
    vision = session.manifest.model.vision
    for size in SIZES:
        expected = oracle.image_features(picture(*size), 70)
        assert expected.std(0).min() > 0.05  # they tell places apart
        assert_close(session.vision(preprocess(picture(*size), 70, vision)), expected, torch.float32)


def test_bfloat16_features_are_as_exact_as_transformers(tmp_path):
    checkpoint = random_checkpoint(tmp_path, vision=VISION)
    exact, oracle = Oracle(checkpoint), Oracle(checkpoint, torch.bfloat16)
    session = network_session(checkpoint, dtype="bfloat16")
    vision = session.manifest.model.vision
    for size in SIZES:
        ours = session.vision(preprocess(picture(*size), 70, vision))
        image = picture(*size)
        assert_as_exact(ours, oracle.image_features(image, 70), exact.image_features(image, 70))


def test_keys_and_values_of_prompts_with_images_equal_transformers(tmp_path):
    """Images wider than the sliding layers' window, whose tokens see each other all the same; text around them."""
    checkpoint = random_checkpoint(tmp_path, vision=VISION)
    oracle, session = Oracle(checkpoint), network_session(checkpoint, dtype="float32", page_size=8)
    model, images = session.manifest.model, [picture(*size) for size in SIZES]
    patches = [preprocess(image, 70, model.vision) for image in images]
    placeholder, text = model.image_token_id, list(range(20, 50))
    prompt = expand([placeholder, *text, placeholder, 5, placeholder, *text], patches, model)
    passes = Passes(session)
    spans = image_spans(prompt, patches, model)
    new_tokens = NewTokens(
        slot=passes.slot,
        token_ids=prompt,
        page_keys=(),
        images=[(span.start, each) for span, each in zip(spans, patches, strict=True)],
    )
    with mock.patch.object(passes.cache, "append") as append:
        encode_new_tokens(session, passes.cache, [new_tokens], keep_pages=False)
    new_kv = [kv[: len(prompt)] for kv in append.call_args.args[2]]
    assert max(span.end - span.start for span in spans) > model.attention["sliding_attention"].window
    for ours, theirs in kept(oracle.encode_with_images(prompt, images, 70), new_kv):
        assert_close(ours, theirs, torch.float32)
