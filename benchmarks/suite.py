"""The benchmarks of `benchmarks/run.py`, in order, with their sizes: whole, for some ten minutes on two cores, or quick.

`small` is the large one of the two checkpoints: `small_checkpoint.py` makes it, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One command. quick: its options in a quick run; None leaves it out. needs: engines that must be there before."""

    name: str
    script: str
    options: Sequence[str | Path]
    quick: Sequence[str | Path] | None
    needs: Sequence[str] = ()

    def command(self, *, quick: bool) -> list[str]:
        more = self.quick if quick else ()
        return [str(FOLDER / self.script), *map(str, self.options), *map(str, more or ())]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A checkpoint and its engine."""

    checkpoint: Path
    engine: Path

    @property
    def options(self) -> tuple[str | Path, ...]:
        return ("--checkpoint", self.checkpoint, "--engine", self.engine)


def suite(tiny: Place, small: Place) -> list[Benchmark]:
    """Loading builds the engine of `small`, which those after it use."""
    short = ("--prompts", 1, "--prompt-tokens", 64, "--canvases", 1, "--steps", 4)
    return [
        Benchmark(name="machine", script="machine.py", options=(), quick=("--quick",)),
        Benchmark(
            name="generation-tiny",
            script="generation.py",
            options=tiny.options,
            quick=("--rounds", 1, "--batches", 1, 4, "--prompts", 1, "--canvases", 1, "--steps", 4),
            needs=("tiny",),
        ),
        Benchmark(
            name="prefill-tiny",
            script="prefill.py",
            options=tiny.options,
            quick=("--rounds", 1, "--lengths", 128),
            needs=("tiny",),
        ),
        Benchmark(
            name="parameters-tiny",
            script="parameters.py",
            options=("--engine", tiny.engine),
            quick=("--rounds", 1, "--batches", 1, 2, "--steps", 2),
            needs=("tiny",),
        ),
        Benchmark(
            name="server",
            script="server.py",
            options=("--engine", tiny.engine),
            quick=("--rounds", 1, "--canvases", 2, "--canvases-a-request", 2, "--steps", 2, "--clients", 1, 2),
            needs=("tiny",),
        ),
        Benchmark(
            name="loading-tiny",
            script="loading.py",
            options=(*tiny.options, "--no-build"),
            quick=("--rounds", 1, "--sequences", 1),
            needs=("tiny",),
        ),
        Benchmark(name="memory", script="memory.py", options=(), quick=("--counts", 1, 2, "--vocab-size", 4096)),
        Benchmark(
            name="loading-small",
            script="loading.py",
            options=(*small.options, "--goals"),
            quick=None,
            needs=("small checkpoint",),
        ),
        Benchmark(
            name="generation-small",
            script="generation.py",
            options=(*small.options, *short, "--rounds", 3),
            quick=None,
            needs=("small checkpoint", "small"),
        ),
        Benchmark(
            name="prefill-small", script="prefill.py", options=small.options, quick=None, needs=("small checkpoint", "small")
        ),
        Benchmark(
            name="parameters-small",
            script="parameters.py",
            options=("--engine", small.engine),
            quick=None,
            needs=("small checkpoint", "small"),
        ),
        Benchmark(
            name="profile-small",
            script="step_profile.py",
            options=("--engine", small.engine),
            quick=None,
            needs=("small checkpoint", "small"),
        ),
    ]
