"""Counter-based noise: the same numbers on every device, whatever else is in the batch.

A value depends only on (seed, canvas_index, step, position, token lane) and on what it is for. Nothing is stored and nothing is
consumed in order, so any subset of rows may be computed anywhere, at any time, and gives the same numbers.

    function                            value                              shape, dtype
    initial_canvas                      random tokens of a new canvas      [C] int64
    renoise_tokens                      random tokens of one step          [C] int64
    gumbel_noise                        Gumbel(0, 1) of one step           [positions, V] float32

`step` is the 0-based index of the denoising step within its canvas: the first step is 0 whatever max_denoising_steps is.
Each has a `_rows` form, for rows of different requests in one call; the scalar forms are those with one seed.

The generator is Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
a counter of four 32-bit words and a key of two give four 32-bit words.

    key      word 0   low 32 bits of the seed           word 1   high 32 bits of the seed
    counter  word 0   token lane // 4                   word 2   step
             word 1   position in the canvas            word 3   stream << 30 | canvas_index
    output   word i   the random word of token lane 4 * (lane // 4) + i

    stream   0 initial canvas (step 0)     1 renoise     2 Gumbel

How a random word w becomes a value:
    token    (w * V) >> 32, of lane 0. Its bias is below V / 2^32 (6e-5 for 262,144 tokens).
    Gumbel   -log(-log(1 - v)) with v = min((w + 1/2) * 2^-32, 1 - 2^-24), each operation rounded to float32 and the inner
             logarithm evaluated as log1p(-v). The large values of the noise, which decide an argmax, come from small v, where
             float32 is finest. The usual -log(-log(u)) takes them from u near 1, where float32 is coarsest: one word in 2^24
             rounds to u = 1, which gives infinity, and tokens less likely than 2^-24 are hardly ever sampled.
             Range: -2.81 (v = 1 - 2^-24) to 22.87 (v = 2^-33).
"""

import torch

_STREAM_INITIAL_CANVAS, _STREAM_RENOISE, _STREAM_GUMBEL = 0, 1, 2
_STREAM_SHIFT = 30

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_LOW_32_BITS = 0xFFFFFFFF

# Counters computed at a time. On a CPU a block's int64 temporaries must stay in the cache: on one EPYC core (1 MiB L2),
# [64, 262144] takes 208 ms in blocks and 1,059 ms in one piece. On a GPU they must only stay well below the noise itself.
_COUNTERS_PER_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 22}


def initial_canvas(
    *, seed: int, canvas_index: int, canvas_length: int, vocab_size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The random tokens that canvas `canvas_index` of a request starts from: [canvas_length] int64."""
    seeds, canvas_indices, _ = _scalars(seed, canvas_index, 0, device)
    return initial_canvas_rows(seeds, canvas_indices, torch.arange(canvas_length, device=device), vocab_size)


def renoise_tokens(
    *, seed: int, canvas_index: int, step: int, canvas_length: int, vocab_size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The random tokens that replace what step `step` (0-based) did not accept: [canvas_length] int64, all positions."""
    seeds, canvas_indices, steps = _scalars(seed, canvas_index, step, device)
    return renoise_tokens_rows(seeds, canvas_indices, steps, torch.arange(canvas_length, device=device), vocab_size)


def gumbel_noise(
    *,
    seed: int,
    canvas_index: int,
    step: int,
    canvas_length: int,
    vocab_size: int,
    positions: range | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The Gumbel noise that step `step` (0-based) adds to the processed logits: [positions, vocab_size] float32.

    `positions` chooses a part of the canvas (default: all of it); the numbers are those of the same rows of the whole.
    """
    positions = range(canvas_length) if positions is None else positions
    if len(positions) and not (min(positions) >= 0 and max(positions) < canvas_length):
        raise ValueError(f"positions: got {positions}, expected within range(0, {canvas_length})")
    seeds, canvas_indices, steps = _scalars(seed, canvas_index, step, device)
    rows = torch.tensor(list(positions), dtype=torch.int64, device=device)
    return gumbel_noise_rows(seeds, canvas_indices, steps, rows, vocab_size)


def initial_canvas_rows(
    seeds: torch.Tensor, canvas_indices: torch.Tensor, positions: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """`initial_canvas` for many rows: int64 tensors of shapes that broadcast (say [B, 1] and [C]) to that of the result, int64.

    `seeds` holds the seeds' 64 bits as `seed_bits` gives them.
    """
    return _tokens(_STREAM_INITIAL_CANVAS, seeds, canvas_indices, torch.zeros_like(seeds), positions, vocab_size)


def renoise_tokens_rows(
    seeds: torch.Tensor, canvas_indices: torch.Tensor, steps: torch.Tensor, positions: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """`renoise_tokens` for many rows: arguments and result as in `initial_canvas_rows`."""
    return _tokens(_STREAM_RENOISE, seeds, canvas_indices, steps, positions, vocab_size)


def gumbel_noise_rows(
    seeds: torch.Tensor, canvas_indices: torch.Tensor, steps: torch.Tensor, positions: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """`gumbel_noise` for many rows: int64 tensors of shapes that broadcast to [R], one entry a row → [R, vocab_size] float32.

    A vocabulary that is no multiple of 4 gives a view of a slightly wider tensor (row stride rounded up to 4).
    """
    seeds, canvas_indices, steps, positions = torch.broadcast_tensors(seeds, canvas_indices, steps, positions)
    (num_rows,), device = seeds.shape, seeds.device
    num_groups = (vocab_size + 3) // 4
    noise = torch.empty(num_rows, num_groups, 4, dtype=torch.float32, device=device)
    lane_groups = torch.arange(num_groups, device=device)
    counter = (positions[:, None], steps[:, None], _stream_word(_STREAM_GUMBEL, canvas_indices)[:, None])
    key = tuple(word[:, None] for word in _key(seeds))

    block = _COUNTERS_PER_BLOCK.get(device.type, _COUNTERS_PER_BLOCK["cuda"])
    rows_per_block = max(1, block // num_groups)
    groups_per_block = min(block, num_groups)
    for row in range(0, num_rows, rows_per_block):
        rows = slice(row, row + rows_per_block)
        for group in range(0, num_groups, groups_per_block):
            groups = slice(group, group + groups_per_block)
            words = philox_4x32_10((lane_groups[None, groups], *(word[rows] for word in counter)), [word[rows] for word in key])
            part = noise[rows, groups]
            for i, word in enumerate(words):
                part[..., i].copy_(word)
            _gumbel_from_words_(part)
    return noise.view(num_rows, num_groups * 4)[:, :vocab_size]


def seed_bits(seed: int) -> int:
    """A seed of 0 .. 2^64 - 1 as the int64 with the same bits, for the tensors of the `_rows` functions."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: got {seed}, expected 0 to 2^64 - 1")
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def philox_4x32_10(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four random words from four counter words and two key words, all int64 tensors that hold 0 .. 2^32 - 1.

    The words' shapes broadcast; those that are constant along an axis stay small for a round or two. Each key word must
    broadcast into counter words 1 and 3.

    Each round, with the products of 32-bit words taken to 64 bits:
    1. product_0 = word_0 * multiplier_0, product_1 = word_2 * multiplier_1
    2. word_0 = high(product_1) ^ word_1 ^ key_0, word_1 = low(product_1)
    3. word_2 = high(product_0) ^ word_3 ^ key_1, word_3 = low(product_0)
    4. each key word += its increment, modulo 2^32

    int64 multiplication keeps the product's low 64 bits, so all of them; the shift that takes the high word copies the sign,
    which the mask then removes.
    """
    word_0, word_1, word_2, word_3 = counter
    round_keys_0, round_keys_1 = (_round_keys(word, increment) for word, increment in zip(key, _KEY_INCREMENTS, strict=True))
    for key_0, key_1 in zip(round_keys_0, round_keys_1, strict=True):
        product_0 = word_0 * _MULTIPLIERS[0]  # 1.
        product_1 = word_2 * _MULTIPLIERS[1]
        low_0, low_1 = product_0 & _LOW_32_BITS, product_1 & _LOW_32_BITS
        high_0, high_1 = product_0.bitwise_right_shift_(32), product_1.bitwise_right_shift_(32)
        word_0 = (high_1 ^ word_1).bitwise_xor_(key_0).bitwise_and_(_LOW_32_BITS)  # 2.
        word_2 = (high_0 ^ word_3).bitwise_xor_(key_1).bitwise_and_(_LOW_32_BITS)  # 3.
        word_1, word_3 = low_1, low_0
    return word_0, word_1, word_2, word_3


def _round_keys(word: torch.Tensor, increment: int) -> tuple[torch.Tensor, ...]:
    """4. of `philox_4x32_10` for all rounds at once; bits above 32 stay, for the round's mask to remove."""
    round_indices = torch.arange(_NUM_ROUNDS, device=word.device).view(-1, *[1] * word.ndim)
    return (word + round_indices * increment).unbind()


def _tokens(stream: int, seeds, canvas_indices, steps, positions, vocab_size: int) -> torch.Tensor:
    """Bounded tokens from the first word of lane 0: int64 of the arguments' broadcast shape."""
    seeds, canvas_indices, steps, positions = torch.broadcast_tensors(seeds, canvas_indices, steps, positions)
    counter = (torch.zeros_like(positions), positions, steps, _stream_word(stream, canvas_indices))
    word, _, _, _ = philox_4x32_10(counter, _key(seeds))
    return (word * vocab_size) >> 32


def _gumbel_from_words_(words: torch.Tensor) -> None:
    """In place, float32: random words (0 .. 2^32 - 1, already rounded to float32) → Gumbel noise."""
    minus_v = words.add_(0.5).mul_(-(2.0**-32)).clamp_(min=-(1 - 2.0**-24))
    minus_v.log1p_().neg_().log_().neg_()


def _stream_word(stream: int, canvas_indices: torch.Tensor) -> torch.Tensor:
    return canvas_indices | (stream << _STREAM_SHIFT)


def _key(seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return seeds & _LOW_32_BITS, (seeds >> 32) & _LOW_32_BITS


def _scalars(seed: int, canvas_index: int, step: int, device) -> tuple[torch.Tensor, ...]:
    """Three int64 tensors [1]: seed, canvas index and step."""
    if not 0 <= canvas_index < 1 << _STREAM_SHIFT:
        raise ValueError(f"canvas_index: got {canvas_index}, expected 0 to 2^{_STREAM_SHIFT} - 1")
    if not 0 <= step < 1 << 32:
        raise ValueError(f"step: got {step}, expected 0 to 2^32 - 1")
    return torch.tensor([[seed_bits(seed)], [canvas_index], [step]], dtype=torch.int64, device=device).unbind()
