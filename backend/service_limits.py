"""How long a service waits, for what, and how much."""

from dataclasses import dataclass

from backend.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class ServiceLimits:
    """When to refuse, and when to give up.

    max_queued: requests beyond those that the batch has places for. queue_timeout_s: from its arrival to a place in the batch.
    load_timeout_s: a worker may take to load the engine. progress_timeout_s: a loaded worker may be silent, which it is while a
    step runs. max_deaths: of workers in a row; the last of them is not replaced. One that has served for deaths_window_s begins
    a new row.
    """

    max_queued: int = 256
    queue_timeout_s: float = 60.0
    load_timeout_s: float = 1800.0
    progress_timeout_s: float = 120.0
    max_deaths: int = 3
    deaths_window_s: float = 600.0

    def overdue(self, waited_s: float) -> RequestError | None:
        """The error of a request that has waited too long for its place."""
        if waited_s <= self.queue_timeout_s:
            return None
        line = f"queue: waited {waited_s:.0f} s, at most {self.queue_timeout_s:g} s; try again later"
        return RequestError("DEADLINE_EXCEEDED", line)
