"""What a benchmark is asked for, checked before it begins: what cannot be measured ends it with one line."""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch


def count(text: str) -> int:
    """An option of argparse: nothing can be measured none times."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return value


def positive(text: str) -> float:
    """An option of argparse: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0")
    return value


def directory(text: str, *, holding: str = "") -> Path:
    """An option of argparse: a directory that is there, with the file `holding` in it."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text}, expected a directory that is there")
    if not (path / holding).exists():
        raise argparse.ArgumentTypeError(f"got {text}, expected a directory with a {holding}")
    return path


checkpoint = partial(directory, holding="config.json")


def engine(text: str) -> Path:
    """An option of argparse: an engine with its programs."""
    path = directory(text, holding="manifest.json")
    if not any(path.glob("denoise.*")):
        raise argparse.ArgumentTypeError(f"got {text}, which has no programs, expected an engine; build it with --force")
    return path


def need_cuda() -> None:
    """Ends the benchmark where there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no CUDA device here, expected one; run this on a machine with a GPU")
