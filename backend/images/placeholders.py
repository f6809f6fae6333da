"""One placeholder in a prompt → the tokens that stand for the image, and back to where they are.

    … <|image|> …  →  … <|image> <|image|> … <|image|> <image|> …       one <|image|> for each soft token of the image

As transformers' `Gemma4Processor`, on token ids: the placeholder is one token, so the text around it is tokenized as there.
"""

from collections.abc import Sequence

from backend.errors import refused
from backend.images.limits import MAX_IMAGES
from backend.images.preprocess import ImagePatches
from backend.prefix_cache import ImageSpan
from contract.model_config import ModelConfig


def expand(token_ids: Sequence[int], images: Sequence[ImagePatches], model_config: ModelConfig) -> list[int]:
    """`token_ids` with the placeholder of each of `images`, in order, replaced by the image's tokens.

    Raises:
        RequestError INVALID_ARGUMENT: images for a model without vision, too many, or not one for each placeholder.
    """
    if images and model_config.vision is None:
        raise refused(f"images: got {len(images)}, but this engine reads text alone; remove them")
    if len(images) > MAX_IMAGES:
        raise refused(f"images: got {len(images)}, expected at most {MAX_IMAGES} in a prompt")
    placeholder = model_config.image_token_id
    num_placeholders = list(token_ids).count(placeholder)
    if num_placeholders != len(images):
        raise refused(
            f"prompt: got {num_placeholders} image placeholders (token {placeholder}) and {len(images)} images, "
            "expected one placeholder for each image"
        )
    if not images:
        return list(token_ids)
    remaining, expanded = iter(images), []
    for token in token_ids:
        if token == placeholder:
            count = next(remaining).num_soft_tokens
            expanded += [model_config.boi_token_id, *[placeholder] * count, model_config.eoi_token_id]
        else:
            expanded.append(token)
    return expanded


def image_spans(token_ids: Sequence[int], images: Sequence[ImagePatches], model_config: ModelConfig) -> list[ImageSpan]:
    """Where each of `images` is in a prompt that `expand` gave.

    Raises:
        RequestError INVALID_ARGUMENT: the prompt's image tokens are not those of the images.
    """
    if images and model_config.vision is None:
        raise refused(f"images: got {len(images)}, but this engine reads text alone; remove them")
    if not images and model_config.image_token_id not in token_ids:
        return []
    runs, start = [], None
    for position, token in enumerate([*token_ids, None]):
        if token == model_config.image_token_id and token is not None:
            start = position if start is None else start
        elif start is not None:
            runs.append((start, position))
            start = None
    got, expected = [end - start for start, end in runs], [image.num_soft_tokens for image in images]
    if got != expected:
        raise refused(
            f"prompt: got image tokens in runs of {got}, expected {expected}, the soft tokens of its {len(images)} images"
        )
    return [ImageSpan(start, end, image.digest) for (start, end), image in zip(runs, images, strict=True)]
