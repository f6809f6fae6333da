"""What is wrong, in lines; of a checkpoint's tensors in a few: one wrong number in config.json makes hundreds of them wrong."""

import re
from collections.abc import Sequence
from pathlib import Path

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SHOWN = 3
"""Lines of a kind; they differ in little but the tensor's name."""


def in_few_lines(directory: Path, *kinds: Sequence[str]) -> str:
    """The first lines of each kind of problem, and how many more there are."""
    lines: list[str] = []
    for kind in kinds:
        lines += kind[:_SHOWN]
        if len(kind) > _SHOWN:
            lines.append(f"… and {len(kind) - _SHOWN} more like these")
    return "\n".join(f"{directory}: {printable(line)}" for line in lines)


def printable(text: str) -> str:
    """The text as one line that leaves a terminal as it is: names of files and tensors may have line breaks, and worse."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def of_another_model(num_differing: int, num_expected: int) -> list[str]:
    """A line that says so, if most of the expected tensors are missing or of another shape."""
    if 2 * num_differing <= num_expected:
        return []
    return [
        f"config.json and the tensors do not belong together: {num_differing} of {num_expected} are missing or of another "
        "shape; download both from one place"
    ]
