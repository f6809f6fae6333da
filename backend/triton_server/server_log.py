"""What a server's log says to who starts it: how far loading is, and why the server ended."""

import re
from pathlib import Path

# Lines of the engine worker: of `load_progress`, and of `engine` about the memory plan.
_NEWS = re.compile(r"(?:[\d-]+ [\d:,]+ backend\.engine: )?(?P<line>(?:weights:|memory  |fits  ).*)")
_NO_SUCH_GPU = re.compile(r"specifies invalid or unsupported gpu id (?P<number>\d+)\..* are: *(?P<there>[\d ]*)", re.MULTILINE)


class LogNews:
    """The lines of a growing log that say how far loading is."""

    def __init__(self, path: Path):
        self._path, self._at, self._begun = path, 0, b""

    def next(self) -> list[str]:
        """Those that were finished since the last call."""
        with self._path.open("rb") as log:
            log.seek(self._at)
            more = log.read()
        self._at += len(more)
        *finished, self._begun = (self._begun + more).split(b"\n")
        found = (_NEWS.fullmatch(line.decode(errors="replace")) for line in finished)
        return [each["line"] for each in found if each]


def failure_reason(log: str) -> str:
    """One line that says why a server does not run: from its log, but for a GPU that is not there, which the log says badly."""
    if found := _NO_SUCH_GPU.search(log):
        there = ", ".join(found["there"].split())
        why = f"expected some of {there}, which Triton can use here" if there else "but Triton finds no GPU here; leave it out"
        return f"--gpus: got {found['number']}, {why}"
    patterns = (
        # What the model raised, without the traceback that follows it in the same line
        r"failed to load '.*?' version \d+: (?:Internal: )?(?:[\w.]+(?:Error|Exception): )?(.*?)(?:\\n|\"$)",
        r"Poll failed for model directory (.*?)\"?$",
        r"failed to start (\w+ service: .*?)\s*\"?$",
        r"^error: (.*)",
        r"^E\d+ .*?\] \"(.*?)\"?$",
    )
    for pattern in patterns:
        if match := re.search(pattern, log, re.MULTILINE):
            return match[1]
    return log.strip().rpartition("\n")[2] or "its log is empty"
