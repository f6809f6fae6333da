"""The engine worker: the child process that owns the device and runs the scheduler. `worker_process.py` starts it.

    reading thread    Submit, Cancel ──▶ inbox ──▶ main thread: apply, tick, report

It ends when its parent does: the connection closes, or the kernel sends it SIGKILL.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from backend.engine import Engine, EngineLimits
from backend.errors import RequestError
from backend.job import CanvasOutput, DraftOutput, Job
from backend.metrics import MetricsDelta
from backend.worker_messages import BEAT_INTERVAL_S, Cancel, Failure, LoadFailed, Ready, Report, Submit, is_last
from contract.checkpoint import CheckpointError
from contract.end_with_parent import end_with
from contract.manifest import ManifestError

_logger = logging.getLogger("engine worker")
_TAKING_S = 0.05
_MAX_FAILED_STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m backend.worker", description="Started by the server, not by hand.")
    parser.add_argument("--connection", type=int, required=True, help="file descriptor of the connection to the parent")
    parser.add_argument("--parent", type=int, required=True, help="process id of the parent")
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--limits", type=json.loads, required=True, help="fields of EngineLimits, a JSON object")
    options = parser.parse_args()

    end_with(options.parent)  # a step that hangs would never see the connection close
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent ends this one
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    os.set_inheritable(options.connection, False)  # a process of our own must not keep the connection open
    connection = Connection(options.connection)
    inbox = Inbox(connection)
    try:
        engine = Engine.load(options.engine, EngineLimits(**options.limits))
    except (ManifestError, CheckpointError) as error:
        _refuse(connection, str(error))
    except Exception as error:  # whatever a damaged program raises: who loads the model must read it, not only the log
        _logger.exception("the engine cannot be loaded")
        first_line = str(error).strip().partition("\n")[0]
        _refuse(connection, f"{options.engine}: cannot be loaded ({first_line}); build the engine again with --force")
    connection.send(
        Ready(
            model=engine.session.manifest.model,
            bos_token=engine.bos_token,
            defaults=engine.defaults,
            max_sequences=engine.plan.max_sequences,
        )
    )
    Loop(engine, inbox, connection).run()


def _refuse(connection: Connection, reason: str) -> NoReturn:
    connection.send(LoadFailed(message=" ".join(reason.split())))
    sys.exit(1)


class Inbox:
    """Messages of the parent, read by a thread of their own, so that the parent never waits for a step."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._messages: deque[Submit | Cancel] = deque()
        self._arrived = threading.Condition()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def take(self, timeout_s: float) -> Submit | Cancel | None:
        """The next one; waits for it at most `timeout_s`."""
        with self._arrived:
            if not self._messages and timeout_s > 0:
                self._arrived.wait(timeout_s)
            return self._messages.popleft() if self._messages else None

    def _read(self) -> None:
        exit_code = 1
        try:
            while True:
                message = self._connection.recv()
                with self._arrived:
                    self._messages.append(message)
                    self._arrived.notify()
        except (EOFError, OSError):  # the parent closed the connection, or is gone
            exit_code = 0
        except Exception:  # one that memory does not suffice for, say
            _logger.exception("a message cannot be read; the worker ends")
        finally:  # whatever it was: without this thread the worker would be deaf, and its heartbeats would go on
            os._exit(exit_code)


class Loop:
    """Runs the scheduler and reports. One thread."""

    def __init__(self, engine: Engine, inbox: Inbox, connection: Connection):
        self._scheduler, self._inbox, self._connection = engine.scheduler, inbox, connection
        self._jobs: dict[int, Job] = {}
        self._waiting: set[int] = set()
        self._num_failed = 0  # device steps since the last canvas
        self._outputs: list[tuple[int, CanvasOutput | DraftOutput | Failure]] = []
        self._measured_s = time.monotonic()

    def run(self) -> None:
        """Until the process ends. At each turn: 1. take messages, waiting only when idle, 2. tick, 3. report."""
        while True:
            self._take()  # 1.
            try:
                self._scheduler.tick()  # 2.
            except Exception:
                # After an unexpected error no row can be trusted: all end, and the next ones start clean.
                _logger.exception("the scheduler failed; every request in flight ends with an error")
                self._scheduler.fail_all(RequestError("INTERNAL", "internal error; see the server's log"))
            self._report()  # 3.
            self._num_failed += self._scheduler.num_failed_steps > 0
            if self._num_failed == _MAX_FAILED_STEPS:
                sys.exit(f"{_MAX_FAILED_STEPS} device steps failed and none succeeded; a new process may start clean")

    def _take(self) -> None:
        """Takes what has come. What takes longer than a step, grammars that have to be made, waits for the next turn, so that
        other requests go on and the parent hears of this process."""
        timeout_s, until_s = BEAT_INTERVAL_S if self._scheduler.is_idle else 0.0, None
        while (message := self._inbox.take(timeout_s)) is not None:
            until_s, timeout_s = until_s or time.monotonic() + _TAKING_S, 0.0
            self._apply(message)
            if time.monotonic() > until_s:
                return

    def _apply(self, message: Submit | Cancel) -> None:
        if isinstance(message, Cancel):
            job = self._jobs.pop(message.handle, None)
            self._waiting.discard(message.handle)
            if job is not None:
                self._scheduler.cancel(job)
            return
        handle = message.handle
        try:
            self._scheduler.check(message.prompt_ids, message.sampling, images=message.images)
            self._jobs[handle] = self._scheduler.add(
                message.prompt_ids,
                message.sampling,
                lambda output: self._on_output(handle, output),
                images=message.images,
                stop_scope=message.stop_scope,
                draft_interval_s=message.draft_interval_s,
                added_at=message.queued_at_s,
            )
        except RequestError as error:
            self._outputs.append((handle, Failure(code=error.code, message=str(error))))
        except Exception:  # of this request alone: the others know nothing of it
            _logger.exception("a request could not be taken")
            self._outputs.append((handle, Failure(code="INTERNAL", message="internal error; see the server's log")))
        else:
            self._waiting.add(handle)

    def _on_output(self, handle: int, output: CanvasOutput | DraftOutput | RequestError) -> None:
        if is_last(output):
            self._jobs.pop(handle, None)
        if isinstance(output, CanvasOutput) and output.finish_reason != "cancelled":
            self._num_failed = 0
        failed = isinstance(output, RequestError)
        self._outputs.append((handle, Failure(code=output.code, message=str(output)) if failed else output))

    def _report(self) -> None:
        started = tuple(handle for handle in self._waiting if handle not in self._jobs or self._jobs[handle].slot >= 0)
        now_s = time.monotonic()
        is_due = now_s - self._measured_s >= BEAT_INTERVAL_S
        if started or self._outputs or is_due:
            self._waiting.difference_update(started)
            metrics = self._measured() if is_due else None
            self._connection.send(Report(started=started, outputs=tuple(self._outputs), metrics=metrics))
            self._outputs = []
            self._measured_s = now_s if is_due else self._measured_s

    def _measured(self) -> MetricsDelta:
        """The parent sees every request end, those that never got here too; it counts them."""
        delta = self._scheduler.metrics.drain()
        counters = {series: value for series, value in delta.counters.items() if series.name != "requests_total"}
        return replace(delta, counters=counters)


if __name__ == "__main__":
    main()
