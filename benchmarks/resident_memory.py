"""What the resident memory of a process is made of, and the moment when a tree of processes held the most.

    weights     pages of mapped safetensors files: the kernel may drop them and read them again
    libraries   pages of mapped programs and libraries
    anonymous   everything that the process allocated: tensors, heaps, compiled code's constants
    other       other mapped files

From `/proc/<pid>/smaps`. A page that two processes map counts in both.
"""

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Resident:
    """Bytes."""

    weights: int = 0
    libraries: int = 0
    anonymous: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, more: "Resident") -> "Resident":
        return Resident(**{field.name: getattr(self, field.name) + getattr(more, field.name) for field in fields(self)})

    def megabytes(self) -> dict[str, int]:
        """Each part and the total, for a record."""
        return {field.name: round(getattr(self, field.name) / 1e6) for field in fields(self)} | {
            "total": round(self.total / 1e6)
        }


def resident(pid: int | str = "self") -> Resident:
    """Raises OSError if the process is gone."""
    parts = dict.fromkeys((field.name for field in fields(Resident)), 0)
    kind = "anonymous"
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines():
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):  # address perms offset dev inode path
            kind = _kind(words[5] if len(words) == 6 else "", executable="x" in words[1])
        elif words[0] == "Rss:":
            parts[kind] += int(words[1]) * 1024
    return Resident(**parts)


def _kind(path: str, *, executable: bool) -> str:
    if not path.startswith("/") or path.startswith(("/dev/zero", "/memfd:")):
        return "anonymous"
    if path.endswith(".safetensors"):
        return "weights"
    return "libraries" if executable or ".so" in path or "/bin/" in path else "other"


def peak_bytes(pid: int | str = "self") -> int:
    """The high-water mark of the resident memory, which the kernel keeps."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def descendants(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):  # it may end while we look
            for children in Path(f"/proc/{each}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


class PeakWatcher:
    """Samples `pid` and its descendants while the `with` block runs. `peaks` then holds, by program, its largest sample;
    `together` the largest sum."""

    def __init__(self, pid: int, *, interval_s: float = 0.1):
        self.peaks: dict[str, Resident] = {}
        self.together = Resident()
        self._pid, self._interval_s = pid, interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakWatcher":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self._take({pid: _program(pid) for pid in descendants(self._pid)})
            if self._ended.wait(self._interval_s):
                return

    def _take(self, programs: Mapping[int, str]) -> None:
        total = Resident()
        for pid, program in programs.items():
            with contextlib.suppress(OSError):
                sample = resident(pid)
                total += sample
                if sample.total > self.peaks.get(program, Resident()).total:
                    self.peaks[program] = sample
        if total.total > self.together.total:
            self.together = total


def _program(pid: int) -> str:
    """What a person calls it: the module of a Python process, or the file."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "ended"
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return module or Path(words[0]).name or "ended"
