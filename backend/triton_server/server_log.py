"""What a server's log says to who starts it: how far loading is, what went wrong, and why the server ended."""

import re
from collections.abc import Sequence
from pathlib import Path

from backend.gpu_groups import group_name
from backend.triton_server.staging import MODEL_NAME

# Lines of the engine worker: of `load_progress`, and of `engine` about the memory plan.
_NEWS = re.compile(r"(?:[\d-]+ [\d:,]+ backend\.engine: )?(?P<line>(?:weights:|memory  |fits  ).*)")
# Lines of the front: of `service` about a worker that has ended, of `model` about one that unloads itself.
_DEATH = re.compile(r'(?:E\d+ .* model\.py:\d+\] ")?(?P<line>(?:engine worker|server|model [^ :]+): .*?)"?')
_INTERNAL_ERROR = b"Traceback (most recent call last)"
_LOADED = f"successfully loaded '{MODEL_NAME}'"
_NO_SUCH_GPU = re.compile(r"specifies invalid or unsupported gpu id (?P<number>\d+)\..* are: *(?P<there>[\d ]*)", re.MULTILINE)


class LogNews:
    """The lines of a growing log that say how far loading is, or that a worker died or the model unloads itself.

    tells_of_errors: whether there was one of the latter, or an internal error, among what was read.
    """

    def __init__(self, path: Path):
        self._path, self._at, self._begun, self.tells_of_errors = path, 0, b"", False

    def next(self) -> list[str]:
        """Those that were finished since the last call; none of a log that somebody has removed."""
        try:
            with self._path.open("rb") as log:
                log.seek(self._at)
                more = log.read()
        except FileNotFoundError:
            return []
        self._at += len(more)
        *finished, self._begun = (self._begun + more).split(b"\n")
        found = []
        for line in finished:
            text = line.decode(errors="replace")
            death = _DEATH.fullmatch(text)
            self.tells_of_errors |= bool(death) or _INTERNAL_ERROR in line
            if news := death or _NEWS.fullmatch(text):
                found.append(news["line"])
        return found


def failure_reason(log: str, gpus: Sequence[int] = ()) -> str:
    """One line that says why a server does not run: from its log, but for a GPU that is not there, which the log says badly.
    gpus: those that the server was to see alone, if any."""
    if found := _NO_SUCH_GPU.search(log):
        if gpus:
            return f"--gpus: got {group_name(gpus)}, expected a GPU that Triton can use here; pass others, or leave it out"
        there = ", ".join(found["there"].split())
        why = f"expected some of {there}, which Triton can use here" if there else "but Triton finds no GPU here; leave it out"
        return f"--gpus: got {found['number']}, {why}"
    of_loading = (
        # What the model raised, without the traceback that follows it in the same line
        r"failed to load '.*?' version \d+: (?:Internal: )?(?:[\w.]+(?:Error|Exception): )?(.*?)(?:\\n|\"$)",
        r"Poll failed for model directory (.*?)\"?$",
    )
    of_the_server = (
        r"failed to start (\w+ service: .*?)\s*\"?$",
        r"^error: (.*)",
        # CudaDriverHelper: what every server without a GPU says
        r"^E\d+ .*?\] \"(?!CudaDriverHelper has not been|failed to load ')(.*?)\"?$",
    )
    # A model that is there is not lost by another that cannot be loaded in its place.
    for pattern in of_the_server if _LOADED in log else of_loading + of_the_server:
        if match := re.search(pattern, log, re.MULTILINE):
            return match[1]
    return log.strip().rpartition("\n")[2] or "its log is empty"
