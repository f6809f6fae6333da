"""What can go wrong, in OpenAI's form: an HTTP status and `{"error": {"message", "type", "param", "code"}}`."""

import re
from collections.abc import Mapping

from openai.types.shared import ErrorObject

from backend.parameters import shown

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


_AT_FAULT = re.compile(
    r"unknown sampling parameter '(.+?)'"
    r"|([\w.\[\]]+)(?:=.*?| of token id \S+| and .+?)?: "
)
# What the client sent, as `shown` shows it: to the quote that ends it, or to where it is cut.
_QUOTED = r"""(?<!\w)(?P<quote>['"])(?:\\.|(?!(?P=quote))[^\\])*?(?:(?P=quote)|\.\.\.)"""
_TOO_LONG = re.compile(r"prompt: got \d+ tokens and max_tokens \d")


class ApiError(Exception):
    """A request that is refused or fails: one line, and the status that it is answered with."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = ErrorObject(message=str(self), type=kind, param=self.param, code=self.code)
        return {"error": error.model_dump(exclude_unset=True)}

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """With the client's names of the parameter at fault and of others that the line has: what to change, or to remove, is
        what the client sent. names: the model's → the client's, where they differ, of parameters and parts of them; the longest
        counts. Behind the parameter at fault, one that is a word as well ("prompt") is that word."""
        line = str(self)
        at_fault = self.param if self.param and line.startswith(self.param) else ""
        param = _renamed(at_fault, names)
        others = {name: here for name, here in names.items() if not name.isalpha()}
        line = param + _renamed(line.removeprefix(at_fault), others)
        return ApiError(self.status, line, code=self.code, param=param or self.param)


class ServerAway(ApiError):
    """503 of a Triton server that cannot be reached, or does not have the model now."""

    def __init__(self, message: str):
        super().__init__(503, message)


class WorkerDied(ApiError):
    """503 of a Triton server whose worker had the request when it died. It may have died of it."""

    def __init__(self, message: str):
        super().__init__(503, message)


def bad_request(message: str) -> ApiError:
    """A 400; the parameter at fault is the one that the line begins with. The code is one that clients look for."""
    found = _AT_FAULT.match(message)
    code = "context_length_exceeded" if _TOO_LONG.match(message) else None
    return ApiError(400, message, code=code, param=found[found.lastindex] if found else None)


def client_gone() -> ApiError:
    """Nobody reads it, nor its status, which is nginx's."""
    return ApiError(499, "the client has gone")


def unknown_model(name: object, served_name: str) -> ApiError:
    message = f"model: got {shown(name)}, expected {served_name!r}"
    return ApiError(404, message, code="model_not_found", param="model")


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """With every name of `names`, but in quotes, as it is there; of several that begin alike, the longest counts."""
    # There may be thousands, of a long chat: the pattern is of those that it can find.
    found_here = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if name in text)
    return re.sub(rf"{_QUOTED}|(?<![\w.])(?P<name>{found_here})(?!\w)", lambda found: names.get(found["name"], found[0]), text)
