"""Several Triton servers as one: which one a request goes to, what happens when it refuses, and what is away."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from stand_in_model import Model
from starlette.testclient import TestClient

from backend.openai_server.app import create_app
from backend.openai_server.balancer import Balancer
from backend.openai_server.errors import ApiError, ServerAway, WorkerDied
from backend.openai_server.settings import OpenAISettings
from backend.openai_server.triton_model import Part

FULL = ApiError(503, "queue: got 256 waiting requests, at most 256; try again later")
AWAY = ServerAway("Triton server at a: cannot be reached (UNAVAILABLE); try again later")


class Server(Model):
    """Refuses with `refusal`, if that is set; ends with `failure` after the first part, if that is."""

    def __init__(self, url: str = "a", *, refusal: ApiError | None = None, failure: ApiError | None = None, ready: bool = True):
        super().__init__()
        self.url, self.refusal, self.failure, self.ready = url, refusal, failure, ready
        self.is_closed = False

    async def generate(self, inputs: dict[str, Any], request_id: str) -> AsyncIterator[Part]:
        if self.refusal:
            self.asked.append(inputs)
            raise self.refusal
        async for part in super().generate(inputs, request_id):
            yield part
            if self.failure:
                raise self.failure

    async def is_ready(self) -> bool:
        if self.ready is None:
            await asyncio.sleep(3600)
        return self.ready

    async def close(self) -> None:
        self.is_closed = True


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run(work: Coroutine) -> Any:
    return asyncio.run(asyncio.wait_for(work, 30))


async def whole(balancer: Balancer) -> str:
    return "".join([part.text async for part in balancer.generate({"text_input": ""}, "1")])


@asynccontextmanager
async def under_way(balancer: Balancer) -> AsyncIterator[None]:
    """A request of which the first part has come, and not the last."""
    async with aclosing(balancer.generate({"text_input": ""}, "1")) as parts:
        await anext(parts)
        yield


def asked(servers: list[Server]) -> list[int]:
    return [len(server.asked) for server in servers]


def test_equal_servers_take_turns():
    async def work() -> None:
        servers = [Server(), Server(), Server()]
        balancer = Balancer(servers)
        for number in range(1, 7):
            assert await whole(balancer) == " three four"
            assert sorted(asked(servers)) == sorted((number + at) // 3 for at in range(3))

    run(work())


def test_a_request_goes_to_the_server_with_the_fewest_under_way():
    async def work() -> None:
        servers = [Server(), Server(), Server()]
        balancer = Balancer(servers)
        async with under_way(balancer), under_way(balancer):
            assert asked(servers) == [1, 1, 0]
            async with under_way(balancer):
                assert asked(servers) == [1, 1, 1]
                async with under_way(balancer):
                    assert asked(servers) == [2, 1, 1]
            for _ in range(3):  # the places are free again, those of requests that were left too
                await whole(balancer)
        assert asked(servers) == [2, 1, 4]

    run(work())


def test_choices_are_requests_of_their_own():
    servers = [Server(), Server()]
    with TestClient(create_app(OpenAISettings(), Balancer(servers))) as client:
        body = {"model": "diffusiongemma", "messages": [{"role": "user", "content": "a"}], "n": 6}
        assert len(client.post("/v1/chat/completions", json=body).json()["choices"]) == 6
        client.post("/v1/completions", json={"model": "diffusiongemma", "prompt": ["a", "b", "c", "d"]})
    assert asked(servers) == [5, 5] and all(server.is_closed for server in servers)


@pytest.mark.parametrize("refusal", [FULL, AWAY])
def test_what_one_server_refuses_the_next_answers(refusal):
    async def work() -> None:
        servers = [Server(refusal=refusal), Server(), Server()]
        balancer = Balancer(servers)
        assert await whole(balancer) == " three four"
        assert asked(servers) == [1, 1, 0]

    run(work())


@pytest.mark.parametrize("others", [[], [FULL, AWAY]])
def test_a_request_that_two_workers_died_of_goes_to_no_third(others):
    """What refuses it for another reason does not count."""
    died = WorkerDied("engine worker: ended by SIGKILL; send the request again")

    async def work() -> None:
        servers = [Server(refusal=each) for each in (died, *others, died)] + [Server()]
        with pytest.raises(WorkerDied):
            await whole(Balancer(servers))
        assert asked(servers) == [1] * (len(servers) - 1) + [0]
        servers = [Server(refusal=died), Server()]
        assert await whole(Balancer(servers)) == " three four"

    run(work())


def test_the_next_is_the_one_with_the_fewest_of_the_others():
    async def work() -> None:
        servers = [Server(), Server(), Server()]
        balancer = Balancer(servers)
        async with under_way(balancer), under_way(balancer), under_way(balancer), under_way(balancer), under_way(balancer):
            assert asked(servers) == [2, 2, 1]
            servers[2].refusal = FULL
            async with under_way(balancer), under_way(balancer):
                assert asked(servers) == [3, 3, 3]

    run(work())


def test_each_server_is_asked_once_and_the_last_refusal_is_told():
    async def work() -> None:
        servers = [Server(refusal=ApiError(503, f"{name}: full")) for name in "abc"]
        with pytest.raises(ApiError, match=r"^c: full$"):
            await whole(Balancer(servers))
        assert asked(servers) == [1, 1, 1]

    run(work())


@pytest.mark.parametrize("status", [400, 500, 504])
def test_other_refusals_are_for_the_client(status):
    async def work() -> None:
        servers = [Server(refusal=ApiError(status, "no")), Server()]
        with pytest.raises(ApiError, match=r"^no$"):
            await whole(Balancer(servers))
        assert asked(servers) == [1, 0]

    run(work())


@pytest.mark.parametrize("failure", [FULL, AWAY])
def test_what_has_begun_to_answer_is_never_repeated(failure):
    async def work() -> None:
        servers = [Server(failure=failure), Server()]
        with pytest.raises(ApiError) as raised:
            await whole(Balancer(servers))
        assert raised.value is failure and asked(servers) == [1, 0]

    run(work())


def test_what_is_away_is_asked_last_for_a_while(caplog):
    async def work() -> None:
        clock = Clock()
        servers = [Server("a", refusal=AWAY), Server("b")]
        balancer = Balancer(servers, clock=clock)
        for _ in range(4):
            await whole(balancer)
        assert asked(servers) == [1, 4]
        async with under_way(balancer), under_way(balancer):
            assert asked(servers) == [1, 6]
        clock.now_s += 5
        await whole(balancer)
        await whole(balancer)
        assert asked(servers) == [2, 8]  # the first is away again
        clock.now_s += 5
        servers[0].refusal = None
        for _ in range(4):
            await whole(balancer)
        assert asked(servers) == [4, 10]

    with caplog.at_level(logging.WARNING):
        run(work())
    gone, back = caplog.messages
    assert gone == f"{AWAY}; meanwhile the others are asked first"
    assert back == "Triton server at a: it answers again"


def test_what_is_full_is_not_away():
    async def work() -> None:
        servers = [Server(refusal=FULL), Server()]
        balancer = Balancer(servers, clock=Clock())
        for _ in range(4):
            await whole(balancer)
        assert asked(servers)[0] > 1

    run(work())


@pytest.mark.parametrize("num_servers", [1, 2])
def test_when_all_are_away_they_are_asked_all_the_same(num_servers):
    async def work() -> None:
        servers = [Server(refusal=AWAY) for _ in range(num_servers)]
        balancer = Balancer(servers, clock=Clock())
        for number in (1, 2):
            with pytest.raises(ServerAway):
                await whole(balancer)
            assert asked(servers) == [number] * num_servers
        servers[-1].refusal = None
        assert await whole(balancer) == " three four"

    run(work())


def test_many_at_once_are_spread_evenly():
    async def work() -> None:
        servers = [Server() for _ in range(3)]
        balancer = Balancer(servers)
        await asyncio.gather(*(whole(balancer) for _ in range(30)))
        assert Counter(asked(servers)) == {10: 3}

    run(work())


@pytest.mark.parametrize(
    ("ready", "status"), [([True, False], 200), ([None, True], 200), ([False, False], 503)], ids=["one", "one hangs", "none"]
)
def test_healthy_is_who_has_a_server_that_is(ready, status):
    settings = OpenAISettings(triton_urls=("a:1", "b:2"))
    with TestClient(create_app(settings, Balancer([Server(ready=each) for each in ready]))) as client:
        reply = client.get("/health")
    assert reply.status_code == status
    if status == 503:
        message = "Triton server at a:1 and at b:2: model diffusiongemma is not ready; try again later"
        assert reply.json()["error"]["message"] == message


def test_metrics_of_several_servers_are_not_mixed():
    with TestClient(create_app(OpenAISettings(triton_urls=("a:1", "b:2")), Balancer([Server(), Server()]))) as client:
        reply = client.get("/metrics")
    assert reply.status_code == 404
    line = "metrics: got 2 Triton servers, expected one; scrape /metrics of each of them instead"
    assert reply.json()["error"]["message"] == line
