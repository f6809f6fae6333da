"""GPUs of replicas, as the command line names them: 0,1 for one each, 0+1,2+3 for two that an engine needs together."""

from collections.abc import Iterable

GpuGroup = tuple[int, ...]


def parse_gpu_groups(text: str) -> list[GpuGroup]:
    """The GPUs of each replica. Raises ValueError, one line."""
    words = [word.split("+") for word in text.split(",") if word]
    numbers = [number for word in words for number in word]
    if text and not (numbers and all(number.isdecimal() and len(number) < 10 for number in numbers)):
        raise ValueError(f"--gpus: got {text!r}, expected numbers and commas like 0,1")
    chosen = [int(number) for number in numbers]
    if twice := [each for at, each in enumerate(chosen) if each in chosen[:at]]:
        raise ValueError(f"--gpus: got {twice[0]} twice, expected each GPU once; remove one, or pass --instances for replicas")
    return [tuple(map(int, word)) for word in words]


def group_name(gpus: Iterable[int]) -> str:
    """As `parse_gpu_groups` reads it."""
    return "+".join(map(str, gpus))
