"""The front end as a process of its own that a `with` block ends. Imports nothing that the front end itself does."""

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from backend.child_process import ending_with_this_process
from backend.openai_server.settings import OpenAISettings

_STOP_TIMEOUT_S = 10.0


class FrontEndError(RuntimeError):
    """The front end cannot start or died; the message is one line."""


class FrontEnd:
    """The front end as a child process: `python -m backend openai`. Entering waits until it takes connections.

    log_path: the file for what it says of itself, in an existing directory; tracebacks of its 500 answers are there.
    """

    def __init__(self, settings: OpenAISettings, log_path: Path):
        self._settings = settings
        self.log_path = log_path
        self._url: str | None = None
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        """http://host:port, with the port that a 0 has become."""
        return self._url

    def __enter__(self) -> "FrontEnd":
        settings = self._settings
        command = [sys.executable, "-m", "backend", "openai", "--host", settings.host]
        command += ["--port", str(settings.port), "--model", settings.model, "--served-name", settings.served_name]
        command += [word for url in settings.triton_urls for word in ("--triton", url)]
        command += ["--max-body-bytes", str(settings.max_body_bytes)]
        if settings.triton_metrics_url:
            command += ["--triton-metrics", settings.triton_metrics_url]
        command += [word for origin in settings.allowed_origins for word in ("--allowed-origin", origin)]
        if settings.api_keys:
            command += ["--api-key-file", "/dev/stdin"]  # not among the arguments, which every user of the machine can read
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                ending_with_this_process(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=Path(__file__).resolve().parents[2],
                start_new_session=True,  # Ctrl-C is for us
            )
        try:
            self._process.stdin.write("\n".join(settings.api_keys))
            self._process.stdin.close()
            line = self._process.stdout.readline()
            if not line:
                self._process.wait(_STOP_TIMEOUT_S)
                self.check_alive()
            self._url = line.split()[3].removesuffix("/v1")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def check_alive(self) -> None:
        """Raises FrontEndError if the process has ended, with the reason if it said one: notes are none."""
        if self._process.poll() is not None:
            lines = self.log_path.read_text(errors="replace").splitlines()
            reasons = [line.removeprefix("error") for line in lines if line.startswith("error: ")]
            ended = f"OpenAI front end ended with exit code {self._process.returncode}{''.join(reasons[-1:])}"
            raise FrontEndError(f"{ended}; its log is {self.log_path}")

    def stop(self) -> None:
        """Ends the process. May be called again."""
        if self._process is None:
            return
        try:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)
        finally:  # a signal may end the wait
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            self._process = None
