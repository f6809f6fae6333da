"""The one exception that a request can end with; its code is the one that Triton Inference Server sends to the client."""

from typing import Literal

ErrorCode = Literal["INVALID_ARGUMENT", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL"]


class RequestError(Exception):
    """A request that is refused or fails: one line that says what, got, expected, remedy.

    It concerns one request alone; every other request goes on.
    """

    def __init__(self, code: ErrorCode, message: str):
        super().__init__(message)
        self.code: ErrorCode = code


def refused(message: str) -> RequestError:
    """Of a request that can never be served: INVALID_ARGUMENT."""
    return RequestError("INVALID_ARGUMENT", message)
