"""Kernel tests in Triton's interpreter, which must be chosen before triton is imported: each file of cases in its own process.

The cases are in files that pytest does not collect by itself; a test names one with the mark `interpreted`. They take minutes
of one core, so they run from the beginning, one file after the other, beside the other tests.
"""

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_TESTS = Path(__file__).parent


class InterpreterRuns:
    """The runs of one session. cases: names of files; each is run once, in this order."""

    def __init__(self, cases: Iterable[str]):
        self._process: subprocess.Popen | None = None
        self._stopped = False
        self._pool = ThreadPoolExecutor(1)
        self._runs = {name: self._pool.submit(self._run, name) for name in cases}

    def check(self, name: str) -> None:
        """Waits for the cases, and fails if one of them has failed."""
        returncode, output = self._runs[name].result()
        assert returncode == 0 and " passed" in output, output

    def stop(self) -> None:
        """Ends what still runs."""
        self._stopped = True
        if self._process is not None:
            self._process.kill()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, name: str) -> tuple[int, str]:
        """The exit status and what was written."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(_TESTS / name)]
        path = os.pathsep.join(filter(None, [str(_TESTS.parent), os.environ.get("PYTHONPATH")]))
        chosen = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        environment = {**os.environ, **chosen, "PYTHONPATH": path}
        self._process = subprocess.Popen(
            command, env=environment, cwd=_TESTS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if self._stopped:
            self._process.kill()
        os.setpriority(os.PRIO_PROCESS, self._process.pid, 10)  # servers that are tested meanwhile go first
        output, _ = self._process.communicate()
        return self._process.returncode, output
