"""What makes a row of a pass the same, bit for bit, whatever else is in the pass: alone or among others, in whatever chunk of
its prompt.

On a GPU a sum is divided among programs, and rounded where its parts are put together. Where the division follows the number of
rows, a row's last bits do, and a few denoising steps later a request's tokens. Here

- norms, rotations, samplers: a row is one program's;
- the products of experts, MLP and router: columns are added in one order, whatever the tile, however many programs share it;
- the product for the soft embeddings: a canvas is a product of its own;
- attention: keys come in blocks that begin at multiples of BLOCK_KEYS, cached or not. How many programs share the blocks
  follows the number of rows, unless it is given (`paged_attention_in_splits`);
- products of PyTorch's library: those of the model's sizes are the same for all numbers of rows from PASS_ROWS on. It does not
  promise that, so `backend.batch_invariance` sees when an engine is loaded.

An engine that is built `batch_invariant` gives the number of programs, and the runtime sees to the rest: passes of multiples of
PASS_ROWS; prompts that are cut, and shared, at multiples of CUT_TOKENS; canvases that are committed in one piece, not shared.
"""

PASS_ROWS = 256
"""Passes take multiples of so many rows. NVIDIA H200, CUDA 13: with 200 rows and more the products of the 26B model are the
same as with 256, with 128 one is not."""

CUT_TOKENS = 64
"""A multiple of every attention kernel's BLOCK_KEYS."""


def num_splits(*, window: int, encoder: bool) -> int:
    """How many programs share a tile's keys: two of layers without a window while canvases are denoised, as many as there are
    for one canvas on an H200; else one. Encoding, a tile may look at all of a pass for the sake of an image, which would move
    the splits.
    """
    return 1 if window or encoder else 2
