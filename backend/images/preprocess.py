"""A decoded image → the pixel patches that the vision program reads.

The result is that of transformers' `Gemma4ImageProcessor`: 1. scale to the largest size that keeps the aspect ratio, has whole
soft tokens along both sides and at most `max_soft_tokens` of them; bicubic, both up and down. 2. Cut into patches; a soft token
stands for a square of pooling_kernel_size² of them. Pixels stay bytes, a quarter of what transformers passes on; the session
scales them. And patches lie soft token by soft token, where transformers has them line by line: they carry their positions, so
that their order changes nothing, and pooling needs no lookup.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from backend.errors import refused
from contract.model_config import SOFT_TOKEN_BUDGETS, VisionConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class ImagePatches:
    """One image, ready for the vision program. S soft tokens in lines from the top left, K² patches each, P pixels a side.

    patches: [S, K², 3 P²] uint8; a patch is its lines of pixels, red, green and blue of each. positions: [S, K², 2] int32,
    (x, y) of each patch, in patches from the top left. digest: 16 bytes, equal for equal patches and positions.
    """

    patches: np.ndarray
    positions: np.ndarray
    digest: bytes

    @property
    def num_soft_tokens(self) -> int:
        return self.patches.shape[0]


def preprocess(image: Image.Image, max_soft_tokens: int, vision: VisionConfig) -> ImagePatches:
    """image: of mode RGB.

    Raises:
        RequestError INVALID_ARGUMENT: a budget that is none of `SOFT_TOKEN_BUDGETS`, an image without pixels, or one so long
            and narrow that the model has no positions for its patches.
    """
    if image.mode != "RGB":
        raise ValueError(f"image: got mode {image.mode}, expected RGB")
    columns, rows = _grid(image.width, image.height, max_soft_tokens, vision)
    kernel, side = vision.pooling_kernel_size, vision.patch_size
    size = (columns * kernel * side, rows * kernel * side)
    pixels = np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))  # 1.
    cut = pixels.reshape(rows, kernel, side, columns, kernel, side, 3).transpose(0, 3, 1, 4, 2, 5, 6)  # 2.
    patches = np.ascontiguousarray(cut).reshape(rows * columns, kernel * kernel, 3 * side * side)
    y, x = np.indices((rows * kernel, columns * kernel), dtype=np.int32)
    lines = np.stack([x, y], axis=-1).reshape(rows, kernel, columns, kernel, 2)
    positions = np.ascontiguousarray(lines.transpose(0, 2, 1, 3, 4)).reshape(rows * columns, kernel * kernel, 2)
    digest = hashlib.blake2b(positions.tobytes(), digest_size=16)
    digest.update(patches.tobytes())
    return ImagePatches(patches=patches, positions=positions, digest=digest.digest())


def max_patch_bytes(max_soft_tokens: int, vision: VisionConfig) -> int:
    """Of the patches of one image and their positions."""
    of_patch = 3 * vision.patch_size**2 + 2 * np.dtype(np.int32).itemsize
    return max_soft_tokens * vision.pooling_kernel_size**2 * of_patch


def _grid(width: int, height: int, max_soft_tokens: int, vision: VisionConfig) -> tuple[int, int]:
    """Columns and rows of soft tokens of an image of width x height pixels."""
    if max_soft_tokens not in SOFT_TOKEN_BUDGETS:
        budgets = ", ".join(map(str, SOFT_TOKEN_BUDGETS))
        raise refused(f"image_soft_tokens: got {max_soft_tokens}, expected one of {budgets}")
    if not width or not height:
        raise refused(f"image: got {width} x {height} pixels, expected at least 1 x 1")
    kernel = vision.pooling_kernel_size
    side = kernel * vision.patch_size
    # In this order of operations: another one rounds differently where a side is a whole number of soft tokens.
    factor = math.sqrt(max_soft_tokens * kernel**2 * vision.patch_size**2 / (width * height))
    columns, rows = math.floor(factor * width / side), math.floor(factor * height / side)
    if not rows:
        columns, rows = min(width // height, max_soft_tokens), 1
    elif not columns:
        columns, rows = 1, min(height // width, max_soft_tokens)
    if max(columns, rows) * kernel > vision.position_embedding_size:
        raise refused(
            f"image: got {width} x {height} pixels, {columns * kernel} x {rows * kernel} patches with image_soft_tokens "
            f"{max_soft_tokens}, expected at most {vision.position_embedding_size} along a side; crop it or lower "
            "image_soft_tokens",
        )
    return columns, rows
