"""The optimization profiles of each program: which sizes its plan takes, and which it is made fast for.

| program | profile | sizes |
|---|---|---|
| encode | `commit` | up to one canvas of tokens: finished canvases, short prompts |
| | `prefill` | more, up to max_encode_tokens; made fast for that many |
| denoise | `batch 1`, `batch 2`, `batch 4`, … | exactly so many sequences, the last max_sequences |
| head | `rows` | up to max_head_rows; made fast for that many |
| vision | `image 70`, `image 140`, … | exactly so many soft tokens: an image's budgets, as far as an encode pass takes them |

The runtime rounds a batch up to a size that a profile takes.
"""

import math

from builder.errors import BuildError
from builder.export import TracedProgram
from contract.manifest import Binding, BuildConfig, Profile
from contract.model_config import SOFT_TOKEN_BUDGETS, ModelConfig

_MAX_VOLUME = 2**31 - 1
"""Elements of a tensor that TensorRT can address."""

_LIKELY_COLUMNS, _LIKELY_PAGES = 64, 1024


def choose_profiles(program: TracedProgram, model: ModelConfig, build: BuildConfig) -> tuple[Profile, ...]:
    """The program's profiles, checked against its bindings.

    Raises:
        BuildError: see `check_profile`.
    """
    canvas, most_tokens, most_sequences = model.canvas_length, build.max_encode_tokens, build.max_sequences
    columns = -(-model.max_position_embeddings // build.page_size)
    shared = {
        "columns": (1, min(_LIKELY_COLUMNS, columns), columns),
        "images": (1, 1, most_tokens),
        **{name: _pages(binding) for binding in program.inputs for name in binding.shape if _counts_pages(name)},
    }

    def profile(name: str, **sizes: tuple[int, int, int]) -> Profile:
        varying = {name for binding in program.inputs for name in binding.shape if isinstance(name, str)}
        kept = {name: size for name, size in (sizes | shared).items() if name in varying}
        checked = Profile(name=name, sizes=kept)
        check_profile(checked, program)
        return checked

    if program.name == "encode":
        sequences = {"sequences": (1, 1, most_sequences), "starts": (2, 2, most_sequences + 1)}
        profiles = [profile("commit", tokens=(1, canvas, canvas), **sequences)]
        if most_tokens > canvas:
            profiles.append(profile("prefill", tokens=(canvas + 1, most_tokens, most_tokens), **sequences))
        return tuple(profiles)
    if program.name == "denoise":
        return tuple(profile(f"batch {size}", sequences=(size,) * 3) for size in batch_sizes(most_sequences))
    if program.name == "vision":
        return tuple(profile(f"image {size}", soft_tokens=(size,) * 3) for size in image_sizes(most_tokens))
    return (profile("rows", rows=(1, build.max_head_rows, build.max_head_rows)),)


def batch_sizes(max_sequences: int) -> tuple[int, ...]:
    """1, 2, 4, … and at last max_sequences."""
    powers = [1 << exponent for exponent in range(max_sequences.bit_length()) if 1 << exponent < max_sequences]
    return (*powers, max_sequences)


def image_sizes(max_encode_tokens: int) -> tuple[int, ...]:
    """The budgets that an encode pass can take, and what it takes, if that is less than the largest."""
    smaller = tuple(size for size in SOFT_TOKEN_BUDGETS if size <= max_encode_tokens)
    return smaller if max_encode_tokens >= SOFT_TOKEN_BUDGETS[-1] else tuple(dict.fromkeys((*smaller, max_encode_tokens)))


def check_profile(profile: Profile, program: TracedProgram) -> None:
    """Compares a profile with the program's bindings.

    Raises:
        BuildError: a size that varies has no range, a range is not one, a range is of no binding, or a binding would be
            larger than TensorRT's tensors can be; names program, profile and binding.
    """
    where = f"program {program.name}, profile '{profile.name}'"
    varying = {name: binding for binding in program.inputs for name in binding.shape if isinstance(name, str)}
    for name, (least, likely, most) in profile.sizes.items():
        if name not in varying:
            raise BuildError(f"{where}: size {name} is of no binding, expected {', '.join(varying)}")
        if not 1 <= least <= likely <= most:
            raise BuildError(f"{where}, size {name}: got {least}, {likely}, {most}, expected at least 1 and ascending")
    for name, binding in varying.items():
        if name not in profile.sizes:
            raise BuildError(f"{where}, binding '{binding.name}': size {name} varies and has no range")
    for binding in program.inputs:
        volume = math.prod(profile.shapes(binding)[2])
        if volume > _MAX_VOLUME:
            raise BuildError(
                f"{where}, binding '{binding.name}': {profile.shapes(binding)[2]} has {volume} elements, expected at most "
                f"{_MAX_VOLUME}; build with smaller limits"
            )


def _counts_pages(name: int | str) -> bool:
    return isinstance(name, str) and name.endswith(".pages")


def _pages(binding: Binding) -> tuple[int, int, int]:
    """As many pages as a tensor can have: how many there are is chosen when the engine is loaded."""
    most = _MAX_VOLUME // math.prod(size for size in binding.shape if isinstance(size, int))
    return 1, min(_LIKELY_PAGES, most), most
