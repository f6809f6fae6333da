"""The processes of a running server: its fronts (stubs) and engine workers, and what is left when it has stopped."""

import contextlib
import os
import tempfile
from pathlib import Path

from backend.triton_server.launch import TritonServer


def engine_workers(server: TritonServer) -> list[int]:
    """Process ids of the engine workers that run, the oldest first."""
    return [pid for pid, command in _session(server.pid).items() if "backend.worker" in command]


def stubs(server: TritonServer) -> list[int]:
    return [pid for pid, command in _session(server.pid).items() if "triton_python_backend_stub" in command]


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def leftovers(name: str) -> list[str]:
    """Processes, shared memory and files of the server whose staging directory is called `name`."""
    found = [command for pid, command in _commands().items() if name in command or name in _environment(pid)]
    return found + [str(path) for folder in ("/dev/shm", tempfile.gettempdir()) for path in Path(folder).glob(f"{name}*")]


def _session(session: int) -> dict[int, str]:
    return {pid: command for pid, command in _commands().items() if command and _session_of(pid) == session}


def _commands() -> dict[int, str]:
    commands = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it may end while we look
            commands[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return dict(sorted(commands.items()))


def _session_of(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[3])  # the fields after the command, which may hold anything


def _environment(pid: int) -> str:
    """The server's TMPDIR names its staging directory, and all its children inherit it."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""
