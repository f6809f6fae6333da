"""The engine worker as its parent sees it: a child process, a connection, and how it ended."""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import Pipe
from pathlib import Path

import backend
from backend.child_process import how_ended
from backend.worker_messages import Cancel, LoadFailed, Ready, Report, Submit
from contract.own_directory import own_directory

_logger = logging.getLogger(__name__)


class WorkerError(Exception):
    """The engine worker cannot be started or has ended; one line."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What a worker is started with. limits: fields of `EngineLimits`. environment: variables beyond the parent's."""

    engine_dir: Path
    limits: Mapping[str, int | bool | None] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


class WorkerProcess:
    """One child process. `send` may be called from any thread, the rest belongs to one, which must live as long as the worker:
    the kernel ends the worker with the thread that started it."""

    def __init__(self, config: WorkerConfig):
        """Starts the process; returns before its engine is loaded. Raises WorkerError if it cannot be started."""
        self._outbox: queue.SimpleQueue[Submit | Cancel | None] = queue.SimpleQueue()
        with ExitStack() as opened:  # closed again if it does not start
            try:
                temporary = opened.enter_context(own_directory("diffusiongemma_worker_"))  # it unpacks its programs there
                self._connection, theirs = map(opened.enter_context, Pipe())
                self._process = _started(config, theirs.fileno(), temporary)
            except OSError as error:
                raise WorkerError(f"engine worker: cannot be started ({error})") from None
            theirs.close()
            self._opened = opened.pop_all()
        # A worker that reads nothing fills the socket; only this thread waits then.
        self._writing = threading.Thread(target=self._write, name="engine worker's outbox", daemon=True)
        self._writing.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Submit | Cancel) -> None:
        """Never blocks. What is sent to a worker that has ended is lost."""
        self._outbox.put(message)

    def receive(self, timeout_s: float) -> Ready | LoadFailed | Report | None:
        """The next message, None if none came in time. Raises WorkerError if the worker has ended."""
        try:
            if self._connection.poll(timeout_s):
                return self._connection.recv()
        except (EOFError, OSError):
            raise WorkerError(f"engine worker: {self._ending()}; see the server's log") from None
        return None

    def end(self) -> None:
        """Ends the process if it has not ended, and releases everything. May be called again."""
        self._process.kill()
        self._process.wait()
        self._outbox.put(None)
        self._writing.join()
        self._opened.close()

    def _ending(self) -> str:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return how_ended(code)

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._connection.send(message)
        except OSError:  # the worker is gone; `receive` says so
            pass
        except Exception:  # without this thread the worker would hear nothing more; a new one starts in its place
            _logger.exception("a message to the engine worker cannot be written; the worker is ended")
            self._process.kill()


def _started(config: WorkerConfig, connection: int, temporary: Path) -> subprocess.Popen:
    """connection: a file descriptor. Raises OSError."""
    options = {"connection": connection, "parent": os.getpid(), "engine": config.engine_dir}
    options |= {"limits": json.dumps(dict(config.limits))}
    # The worker is this very program, wherever its parent found it.
    paths = filter(None, (str(Path(backend.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(temporary)} | config.environment
    command = [sys.executable, "-m", "backend.worker", *(f"--{name}={value}" for name, value in options.items())]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, pass_fds=[connection])
