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


def directory(text: str, *, holding: str = "") -> Path:
    """An option of argparse: a directory that is there, with the file `holding` in it."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text}, expected a directory that is there")
    if not (path / holding).exists():
        raise argparse.ArgumentTypeError(f"got {text}, expected a directory with a {holding}")
    return path


checkpoint = partial(directory, holding="config.json")
engine = partial(directory, holding="manifest.json")


def need_cuda() -> None:
    """Ends the benchmark where there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no CUDA device here, expected one; run this on a machine with a GPU")
