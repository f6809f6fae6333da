"""Several Triton servers that have the same model, as one: a request goes to the server with the fewest under way."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from backend.openai_server.errors import ApiError, ServerAway, WorkerDied
from backend.openai_server.triton_model import Part, TritonModel

_logger = logging.getLogger(__name__)
# What is away is asked last for so long. A refusal of what cannot be reached costs next to nothing, but that of a server whose
# model is gone takes a round trip, which would come first in every request: such a server has the fewest under way.
_AWAY_S = 3.0
_MOST_DEATHS = 2


@dataclass(eq=False)
class _Server:
    model: TritonModel
    num_under_way: int = 0
    is_away: bool = False
    away_until_s: float = 0.0


class Balancer:
    """What a `TritonModel` is, made of one or several. Counts its own requests alone, not those of other front ends.

    1. The server is the one with the fewest requests under way; those that are away come last, and equal ones take turns.
    2. If it refuses with status 503 (it cannot be reached, has no place, or its worker died) before the first part, the next
       is asked, and no server twice; but none once two workers have died, for it may be the request that they die of. What has
       begun to answer is never asked for again.
    3. The last refusal is raised.
    """

    def __init__(self, models: Sequence[TritonModel], *, clock: Callable[[], float] = time.monotonic):
        self._servers = [_Server(model) for model in models]
        self._clock = clock
        self._first = 0  # of those that are equal

    async def close(self) -> None:
        for server in self._servers:
            await server.model.close()

    async def is_ready(self) -> bool:
        """Whether any server would take a request now; the others are not waited for."""
        asked = [asyncio.ensure_future(server.model.is_ready()) for server in self._servers]
        try:
            for answer in asyncio.as_completed(asked):
                if await answer:
                    return True
            return False
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def generate(self, inputs: Mapping[str, Any], request_id: str) -> AsyncIterator[Part]:
        """As `TritonModel.generate`."""
        unasked, num_deaths = list(self._servers), 0
        while True:
            server = self._next(unasked)  # 1.
            unasked.remove(server)
            has_begun = False
            server.num_under_way += 1
            try:
                async with aclosing(server.model.generate(inputs, request_id)) as parts:
                    async for part in parts:
                        has_begun = True
                        self._is_back(server)
                        yield part
                return
            except ApiError as error:
                if isinstance(error, ServerAway):
                    self._is_gone(server, error)
                num_deaths += isinstance(error, WorkerDied)
                if error.status != 503 or has_begun or not unasked or num_deaths == _MOST_DEATHS:  # 2., 3.
                    raise
            finally:
                server.num_under_way -= 1

    def _next(self, unasked: Sequence[_Server]) -> _Server:
        now_s, num_servers = self._clock(), len(self._servers)

        def rank(server: _Server) -> tuple[bool, int, int]:
            turn = (self._servers.index(server) - self._first) % num_servers
            return now_s < server.away_until_s, server.num_under_way, turn

        server = min(unasked, key=rank)
        self._first = (self._servers.index(server) + 1) % num_servers
        return server

    def _is_gone(self, server: _Server, error: ServerAway) -> None:
        if not server.is_away and len(self._servers) > 1:
            _logger.warning("%s; meanwhile the others are asked first", error)
        server.is_away, server.away_until_s = True, self._clock() + _AWAY_S

    def _is_back(self, server: _Server) -> None:
        if server.is_away and len(self._servers) > 1:
            _logger.warning("Triton server at %s: it answers again", server.model.url)
        server.is_away = False
