"""Patches, positions and placeholders of images against transformers' Gemma 4 processors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_checkpoints import TINY
from transformers import Gemma4Processor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from backend.errors import RequestError
from backend.images.limits import MAX_IMAGES
from backend.images.placeholders import expand, image_spans
from backend.images.preprocess import ImagePatches, preprocess
from builder.config import read_model_config
from contract.model_config import SOFT_TOKEN_BUDGETS

MODEL = read_model_config(TINY)
LARGE_TABLE = MODEL.vision.model_copy(update={"position_embedding_size": 10_240})  # the 26B model's


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def by_position(patches: np.ndarray, positions: np.ndarray) -> dict[tuple[int, int], bytes]:
    return {tuple(place): patch.tobytes() for place, patch in zip(positions.tolist(), patches, strict=True)}


def check_equals_transformers(image: Image.Image, max_soft_tokens: int) -> ImagePatches:
    expected = Gemma4ImageProcessorPil(max_soft_tokens=max_soft_tokens)(image, return_tensors="pt")
    ours = preprocess(image, max_soft_tokens, LARGE_TABLE)
    assert ours.num_soft_tokens == expected["num_soft_tokens_per_image"][0]
    positions = expected["image_position_ids"][0]
    real = (positions >= 0).all(dim=1)
    # Pixels as transformers has them, a 255th of a byte's value, in float32.
    pixels = (ours.patches.astype(np.float64) * (1 / 255)).astype(np.float32)
    theirs = by_position(expected["pixel_values"][0][real].numpy(), positions[real].numpy())
    assert by_position(pixels.reshape(-1, pixels.shape[-1]), ours.positions.reshape(-1, 2)) == theirs
    return ours


@pytest.mark.parametrize("max_soft_tokens", SOFT_TOKEN_BUDGETS)
@pytest.mark.parametrize("size", [(1, 1), (640, 480), (33, 500), (768, 768), (3000, 7), (7, 3000)])
def test_patches_equal_transformers(size, max_soft_tokens):
    check_equals_transformers(picture(*size), max_soft_tokens)


@given(width=st.integers(1, 700), height=st.integers(1, 700))
@settings(max_examples=15, deadline=None)
def test_patches_of_any_size_equal_transformers(width, height):
    check_equals_transformers(picture(width, height, seed=width), 70)


def test_patches_of_a_soft_token_are_its_square_of_the_image():
    """By hand: 10 x 7 soft tokens, of 3 x 3 patches of 16 x 16 pixels; the size is kept."""
    image = picture(480, 336)
    ours, pixels = preprocess(image, 70, MODEL.vision), np.asarray(image)
    assert ours.num_soft_tokens == 70
    for token, patch, (x, y) in [(0, 0, (0, 0)), (0, 5, (2, 1)), (11, 7, (4, 5)), (69, 8, (29, 20))]:
        assert ours.positions[token, patch].tolist() == [x, y]
        square = pixels[16 * y : 16 * (y + 1), 16 * x : 16 * (x + 1)]
        assert (ours.patches[token, patch] == square.reshape(-1)).all()


def test_a_digest_tells_images_apart():
    """By the pixels that the model sees, and by their arrangement: two images of one colour differ in shape alone."""
    same = [preprocess(picture(100, 90), 70, MODEL.vision).digest for _ in range(2)]
    assert same[0] == same[1] and len(same[0]) == 16
    others = [(picture(100, 90, seed=1), 70), (picture(100, 90), 140)]
    others += [(Image.new("RGB", size, "red"), 70) for size in ((100, 300), (300, 100))]
    assert len({same[0], *(preprocess(image, budget, LARGE_TABLE).digest for image, budget in others)}) == 5


def test_what_cannot_be_cut_into_patches_is_refused():
    for arguments, message in [
        ((picture(9, 9), 100), "image_soft_tokens: got 100, expected one of 70, 140, 280, 560, 1120"),
        ((Image.new("RGB", (0, 5)), 70), "image: got 0 x 5 pixels, expected at least 1 x 1"),
        (
            (picture(900, 9), 280),
            "image: got 900 x 9 pixels, 501 x 3 patches with image_soft_tokens 280, expected at most 256 along a side; "
            "crop it or lower image_soft_tokens",
        ),
    ]:
        with pytest.raises(RequestError) as refused:
            preprocess(*arguments, MODEL.vision)
        assert (refused.value.code, str(refused.value)) == ("INVALID_ARGUMENT", message)
    with pytest.raises(ValueError, match="got mode L, expected RGB"):
        preprocess(Image.new("L", (9, 9)), 70, MODEL.vision)


def test_placeholders_are_expanded_as_by_transformers(chat_tokenizer):
    images = [preprocess(picture(*size), 70, MODEL.vision) for size in [(100, 90), (90, 100), (400, 90)]]
    counts = [image.num_soft_tokens for image in images]
    processor = SimpleNamespace(boi_token="<|image>", image_token="<|image|>", eoi_token="<image|>")
    text = "Add <|image|> and<|image|><|image|>"
    pieces = text.split("<|image|>")
    expanded = pieces[0]
    for index, piece in enumerate(pieces[1:]):
        expanded += Gemma4Processor.replace_image_token(processor, {"num_soft_tokens_per_image": counts}, index) + piece
    ours = expand(chat_tokenizer(text)["input_ids"], images, MODEL)
    assert ours == chat_tokenizer(expanded)["input_ids"]
    spans = image_spans(ours, images, MODEL)
    assert [span.key for span in spans] == [image.digest for image in images]
    assert [span.end - span.start for span in spans] == counts
    is_image = torch.tensor(ours) == MODEL.image_token_id
    assert is_image.sum() == sum(counts)
    for span in spans:
        assert is_image[span.start : span.end].all()
        assert (ours[span.start - 1], ours[span.end]) == (MODEL.boi_token_id, MODEL.eoi_token_id)


def test_a_prompt_without_images_stays_as_it_is():
    assert expand((5, 6), (), MODEL) == [5, 6]
    assert image_spans([5, 6], (), MODEL) == []


def test_prompts_and_images_that_do_not_fit_are_refused():
    image = preprocess(picture(100, 100), 70, MODEL.vision)
    text_only = MODEL.model_copy(update={"vision": None})
    placeholder, count = MODEL.image_token_id, image.num_soft_tokens
    for function, arguments, message in [
        (expand, ([5], [image], text_only), "images: got 1, but this engine reads text alone; remove them"),
        (image_spans, ([5], [image], text_only), "images: got 1, but this engine reads text alone; remove them"),
        (expand, ([placeholder] * 8, [image] * 8, MODEL), f"images: got 8, expected at most {MAX_IMAGES} in a prompt"),
        (
            expand,
            ([placeholder, 5, placeholder], [image], MODEL),
            "prompt: got 2 image placeholders (token 18) and 1 images, expected one placeholder for each image",
        ),
        (
            image_spans,
            ([placeholder] * 3 + [5, placeholder], [image], MODEL),
            f"prompt: got image tokens in runs of [3, 1], expected [{count}], the soft tokens of its 1 images",
        ),
    ]:
        with pytest.raises(RequestError) as refused:
            function(*arguments)
        assert (refused.value.code, str(refused.value)) == ("INVALID_ARGUMENT", message)
