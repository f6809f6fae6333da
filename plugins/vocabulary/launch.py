"""How the sampler's kernels are launched: arguments, grids, tiles, and the calls on tensors.

See the package's docstring for arguments and results. Everything here works on CUDA tensors, on meta tensors (to describe and
compile), and on CPU tensors in Triton's interpreter. Launches go to the current stream; nothing waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from plugins.triton_launch import Launch
from plugins.vocabulary.acceptance_kernel import acceptance_kernel
from plugins.vocabulary.kernel import vocabulary_merge_kernel, vocabulary_tile_kernel
from plugins.vocabulary.tables import Adjustment

# A warp works alone, so that its many reductions need no barrier. NVIDIA H200, Triton 3.6, 256 rows of 262,144 columns: 208 µs;
# tiles of 128 blocks: 203, of 32: 212; 512 columns, 32 blocks, 1 warp: 238, 2 warps: 227, 4 warps: 247; 1024 columns, 4 warps:
# 238; 2048 columns, 16 blocks, 4 warps: 276. 128 blocks would leave few programs for fewer rows.
_BLOCK_COLUMNS, _TILE_BLOCKS, _TILE_WARPS = 256, 64, 1
_OTHERS = 32


class VocabularyResult(NamedTuple):
    argmax: Tensor
    sampled: Tensor
    entropy: Tensor
    logprob: Tensor


class AcceptanceResult(NamedTuple):
    canvas: Tensor
    stable_steps: Tensor
    converged: Tensor


def vocabulary_pass(
    raw_logits: Tensor,
    *,
    cap: float | None,
    temperature: Tensor,
    greedy: Tensor,
    seeds: Tensor,
    canvas_indices: Tensor,
    steps: Tensor,
    positions: Tensor,
    adjustment: Adjustment | None = None,
) -> VocabularyResult:
    """Argmax, sampled token, entropy and the argmax's log probability of each row of logits."""
    if not raw_logits.is_contiguous():
        raise ValueError(
            f"raw_logits: got strides {raw_logits.stride()}, expected a contiguous tensor (it is too large to copy)"
        )
    per_row = (temperature, *(adjustment or Adjustment.none(raw_logits)), greedy, seeds, canvas_indices, steps, positions)
    numbers, tokens = tile_launch((raw_logits, *(each.contiguous() for each in per_row)), cap).run()
    return VocabularyResult(*merge_launch(numbers, tokens).run())


def accept_and_renoise(
    *,
    entropy: Tensor,
    argmax: Tensor,
    sampled: Tensor,
    bound: Tensor,
    confidence_threshold: Tensor,
    previous_argmax: Tensor,
    stable_steps: Tensor,
    stability_threshold: Tensor,
    seeds: Tensor,
    canvas_indices: Tensor,
    steps: Tensor,
    vocab_size: int,
) -> AcceptanceResult:
    """The next canvas of each sequence, and whether it has converged."""
    of_the_step = (entropy, argmax, sampled, bound, confidence_threshold)
    state = (previous_argmax, stable_steps, stability_threshold)
    inputs = (*of_the_step, *state, seeds, canvas_indices, steps)
    return AcceptanceResult(*acceptance_launch(tuple(each.contiguous() for each in inputs), vocab_size).run())


def tile_launch(inputs: tuple[Tensor, ...], cap: float | None) -> Launch:
    """inputs: raw_logits, temperature, the adjustment's, greedy, seeds, canvas_indices, steps, positions. Outputs
    numbers and tokens, for `merge_launch`."""
    raw_logits = inputs[0]
    if raw_logits.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"vocabulary kernel: got logits of {raw_logits.dtype}, expected torch.bfloat16 or torch.float32")
    if cap is not None and cap <= 0:
        raise ValueError(f"vocabulary kernel: got soft cap {cap}, expected a number above 0, or None")
    num_rows, vocab_size = raw_logits.shape
    columns = block_columns(_BLOCK_COLUMNS, vocab_size)
    num_tiles = -(-vocab_size // (columns * _TILE_BLOCKS))
    return Launch(
        kernel=vocabulary_tile_kernel,
        grid=(num_rows, num_tiles),
        inputs=inputs,
        scalars=(num_rows,),
        outputs=(
            raw_logits.new_empty(4, num_rows, num_tiles, dtype=torch.float32),
            raw_logits.new_empty(2, num_rows, num_tiles, dtype=torch.int32),
        ),
        constants={"VOCAB_SIZE": vocab_size, "CAP": float(cap or 0), "BLOCK": columns, "BLOCKS": _TILE_BLOCKS},
        num_warps=_TILE_WARPS,
        num_stages=1,
    )


def merge_launch(numbers: Tensor, tokens: Tensor) -> Launch:
    """Outputs argmax, sampled, entropy and logprob."""
    _, num_rows, num_tiles = numbers.shape
    return Launch(
        kernel=vocabulary_merge_kernel,
        grid=(num_rows,),
        inputs=(numbers, tokens),
        scalars=(num_rows,),
        outputs=(
            numbers.new_empty(num_rows, dtype=torch.int64),
            numbers.new_empty(num_rows, dtype=torch.int64),
            numbers.new_empty(num_rows),
            numbers.new_empty(num_rows),
        ),
        constants={"NUM_TILES": num_tiles, "BLOCK_TILES": power_of_two(num_tiles)},
        num_warps=1,
        num_stages=1,
    )


def acceptance_launch(inputs: tuple[Tensor, ...], vocab_size: int) -> Launch:
    """inputs: the tensors of `accept_and_renoise`, in its order. Outputs canvas, new_stable_steps, converged."""
    entropy, _, sampled, *_ = inputs
    stable_steps = inputs[6]
    num_sequences, canvas_length = entropy.shape
    return Launch(
        kernel=acceptance_kernel,
        grid=(num_sequences,),
        inputs=inputs,
        scalars=(),
        outputs=(torch.empty_like(sampled), torch.empty_like(stable_steps), torch.empty_like(stable_steps, dtype=torch.bool)),
        constants={
            "VOCAB_SIZE": vocab_size,
            "CANVAS_LENGTH": canvas_length,
            "BLOCK": power_of_two(canvas_length),
            "BLOCK_OTHERS": _OTHERS,
        },
        num_warps=8,
        num_stages=1,
    )


def block_columns(most: int, vocab_size: int) -> int:
    """Of a block: `most`, or fewer that hold the vocabulary; whole groups of the noise's lanes."""
    return min(most, power_of_two(max(vocab_size, 16)))


def power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
