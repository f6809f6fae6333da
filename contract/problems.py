"""What is wrong with a checkpoint's tensors, in a few lines: one wrong number in config.json makes hundreds of them wrong."""

from collections.abc import Sequence
from pathlib import Path

_SHOWN = 3
"""Lines of a kind; they differ in little but the tensor's name."""


def in_few_lines(directory: Path, *kinds: Sequence[str]) -> str:
    """The first lines of each kind of problem, and how many more there are."""
    lines: list[str] = []
    for kind in kinds:
        lines += kind[:_SHOWN]
        if len(kind) > _SHOWN:
            lines.append(f"… and {len(kind) - _SHOWN} more like these")
    return "\n".join(f"{directory}: {line}" for line in lines)


def of_another_model(num_differing: int, num_expected: int) -> list[str]:
    """A line that says so, if most of the expected tensors are missing or of another shape."""
    if 2 * num_differing <= num_expected:
        return []
    return [
        f"config.json and the tensors do not belong together: {num_differing} of {num_expected} are missing or of another "
        "shape; download both from one place"
    ]
