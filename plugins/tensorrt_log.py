"""TensorRT's log, for builder and backend: its errors are kept, to be part of the error that the user sees."""

from types import ModuleType
from typing import Any


def collecting_logger(trt: ModuleType) -> Any:
    """A `tensorrt.ILogger` that keeps errors in its list `errors` and drops the rest."""

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return Logger()
