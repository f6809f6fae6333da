"""The HTTP service: routes, keys, errors, disconnects.

| route                      | what                                                                              |
|----------------------------|-----------------------------------------------------------------------------------|
| POST /v1/chat/completions  | see `chat`; with `stream`, server-sent events that end with `data: [DONE]`        |
| POST /v1/completions       | see `completions`; likewise                                                       |
| POST /v1/responses         | see `responses`; with `stream`, events with names, of which the last says the end |
| GET  /v1/models            | the one model                                                                     |
| GET  /health               | 200 if the model of any Triton server would take a request, else 503              |
| GET  /metrics              | the metrics of the only Triton server, passed on                                  |

With API keys, everything under /v1 wants `Authorization: Bearer KEY`. Every response has an `x-request-id`. Pages of allowed
origins may call all of it.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

import httpx2
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from openai.types import Model
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backend.openai_server.balancer import Balancer
from backend.openai_server.chat import ChatCompletions
from backend.openai_server.completions import Completions
from backend.openai_server.errors import ApiError, client_gone
from backend.openai_server.parameters import new_id
from backend.openai_server.requests import CHAT, COMPLETION, body_schema, read_body
from backend.openai_server.response_body import RESPONSE
from backend.openai_server.responses import Responses
from backend.openai_server.routes import no_such_method, no_such_route
from backend.openai_server.settings import OpenAISettings
from backend.openai_server.triton_model import TritonModel
from backend.parameters import shown

T = TypeVar("T")
_DONE = "data: [DONE]\n\n"
_METRICS_TIMEOUT_S = 10


def create_app(settings: OpenAISettings, model: Balancer | None = None) -> FastAPI:
    """The front end. `model`: a stand-in for the settings' Triton servers, which are connected to when the app starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        app.state.model = model or Balancer([TritonModel(url, settings.model) for url in settings.triton_urls])
        yield
        await app.state.model.close()

    app = _Service(settings.allowed_origins, title="DiffusionGemma", lifespan=lifespan, redirect_slashes=False)
    created = int(time.time())
    guarded = [Depends(_key_check(settings.api_keys))]
    documented = {}
    posted = [*guarded, Depends(_page_check(settings.allowed_origins))]

    def post(path: str, adapter) -> Any:
        schema, components = body_schema(adapter, settings.served_name, path.removeprefix("/v1/").replace("/", "."))
        documented.update(components)
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        return app.post(path, dependencies=posted, openapi_extra={"requestBody": body})

    @post("/v1/chat/completions", CHAT)
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, CHAT, settings)
        return await _answer(request, ChatCompletions(app.state.model, body), body)

    @post("/v1/completions", COMPLETION)
    async def completions(request: Request) -> Response:
        body = await read_body(request, COMPLETION, settings)
        return await _answer(request, Completions(app.state.model, body), body)

    @post("/v1/responses", RESPONSE)
    async def responses(request: Request) -> Response:
        body = await read_body(request, RESPONSE, settings)
        return await _answer(request, Responses(app.state.model, body), body, end="")

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(settings.served_name, created)]}

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def one_model(name: str) -> dict[str, Any]:
        if name != settings.served_name:
            raise ApiError(
                404, f"model: got {name!r}, expected {settings.served_name!r}", code="model_not_found", param="model"
            )
        return _described(name, created)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not await app.state.model.is_ready():
            servers = f"Triton server at {' and at '.join(settings.triton_urls)}"
            raise ApiError(503, f"{servers}: model {settings.model} is not ready; try again later")
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return await _passed_on_metrics(settings)

    app.add_exception_handler(ApiError, lambda _, error: JSONResponse(error.body(), error.status))
    app.add_exception_handler(HTTPException, _answer_without_route)
    # What recurses here is writing JSON, as deep as the body; what is too deep to be read is refused by `read_body`.
    too_deep = ApiError(400, "body: got JSON that is nested too deeply, expected fewer levels", param="body")
    app.add_exception_handler(RecursionError, lambda *_: JSONResponse(too_deep.body(), too_deep.status))
    app.add_exception_handler(
        Exception, lambda *_: JSONResponse(ApiError(500, "internal error; see the front end's log").body(), 500)
    )
    generated = app.openapi

    def openapi() -> dict[str, Any]:
        document = generated()
        document.setdefault("components", {}).setdefault("schemas", {}).update(documented)
        return document

    app.openapi = openapi
    return app


class _Service(FastAPI):
    """Every response, errors too, has the header x-request-id: the completion's id, under which the Triton server knows the
    request, or one of its own."""

    def __init__(self, allowed_origins: Sequence[str], **options: Any):
        super().__init__(**options)
        self._allowed_origins = allowed_origins

    def build_middleware_stack(self) -> ASGIApp:
        """CORS is outermost: a page may read every error, and its preflight, which browsers send without a key, needs none."""
        stack = super().build_middleware_stack()
        if not self._allowed_origins:
            return stack
        return CORSMiddleware(
            stack,
            allow_origins=self._allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client sends a dozen of its own beside Authorization and Content-Type
            expose_headers=["x-request-id"],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = scope["request_id"]
            await send(message)

        scope["request_id"] = new_id("req-")
        await super().__call__(scope, receive, send_with_id)


def _answer_without_route(request: Request, error: HTTPException) -> Response:
    """Nothing else raises these here: they are the router's, 404 and 405."""
    if error.status_code == 405:
        answer = no_such_method(request, error.headers["Allow"])
    else:
        answer = no_such_route(request.app, request)
    return JSONResponse(answer.body(), answer.status, headers=error.headers)


async def _answer(
    request: Request, asked: ChatCompletions | Completions | Responses, body: dict[str, Any], *, end: str = _DONE
) -> Response:
    """What goes wrong before the first chunk has a status of its own; after it, the error is the last event. end: what follows
    the last chunk."""
    request.scope["request_id"] = asked.id
    if not body.get("stream"):
        return JSONResponse(await _unless_disconnected(request, asked.whole()))
    chunks = asked.chunks()
    first = await _unless_disconnected(request, anext(chunks))
    return _EventStream(_events(request, first, chunks, end), chunks)


class _EventStream(StreamingResponse):
    """Closes `chunks` when it ends, however that is: the generation ends with it, not when memory is collected."""

    def __init__(self, events: AsyncIterator[str], chunks: AsyncGenerator[dict[str, Any], None]):
        super().__init__(events, media_type="text/event-stream")
        self._chunks = chunks

    async def __call__(self, *args) -> None:
        try:
            await super().__call__(*args)
        finally:
            await self.body_iterator.aclose()
            await self._chunks.aclose()  # for events that never began


async def _events(
    request: Request, first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]], end: str
) -> AsyncIterator[str]:
    yield _event(first)
    try:
        while True:
            yield _event(await _unless_disconnected(request, anext(chunks)))
    except StopAsyncIteration:
        yield end
    except ApiError as error:
        yield _event(error.body())


def _event(data: dict[str, Any]) -> str:
    """In ASCII: U+2028 and a few others, which may stand in a line, are the end of one for some clients. The type that
    events of a response have is their name."""
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data, separators=(',', ':'))}\n\n"


async def _unless_disconnected(request: Request, result: Awaitable[T]) -> T:
    """The result; if the client goes first, `result` is cancelled and ApiError raised."""
    work, gone = asyncio.ensure_future(_awaited(result)), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise client_gone()
    finally:
        for task in (work, gone):
            task.cancel()
        results = await asyncio.gather(work, gone, return_exceptions=True)
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


async def _awaited(result: Awaitable[T]) -> T:
    return await result


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _key_check(keys: tuple[str, ...]):
    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]) -> None:
        sent = (given.credentials if given else "").encode("latin-1")  # the bytes that came, which Starlette reads so
        # Every key is compared, in constant time, so that the time taken says nothing about them.
        right = [hmac.compare_digest(sent, key.encode()) for key in keys]
        if keys and not any(right):
            raise ApiError(401, "API key: missing or wrong; send the header Authorization: Bearer KEY", code="invalid_api_key")

    return check


def _page_check(allowed_origins: Sequence[str]):
    async def check(request: Request) -> None:
        """A browser lets any page post to any server, so long as it sends what it calls text; only the answer stays hidden."""
        origin, own = request.headers.get("origin"), request.headers.get("host")
        if origin is not None and not {origin, "*"} & set(allowed_origins) and origin.rpartition("://")[2] != own:
            got = f"origin: got {shown(origin)}, expected a page that may call"
            raise ApiError(403, f"{got}; start the server with --allowed-origin and the page's origin, or *")

    return check


def _described(name: str, created: int) -> dict[str, Any]:
    return Model(id=name, object="model", created=created, owned_by="google").model_dump()


async def _passed_on_metrics(settings: OpenAISettings) -> Response:
    url, num_servers = settings.triton_metrics_url, len(settings.triton_urls)
    if num_servers > 1:  # each has series of the same names and labels
        raise ApiError(404, f"metrics: got {num_servers} Triton servers, expected one; scrape /metrics of each of them instead")
    if url is None:
        raise ApiError(404, "metrics: this front end was not told of a Triton server's; start it with --triton-metrics")
    try:
        # No proxy of the environment: the address is one that was given here.
        async with httpx2.AsyncClient(trust_env=False, timeout=_METRICS_TIMEOUT_S) as client:
            reply = await client.get(url)
    except httpx2.HTTPError as error:
        raise ApiError(503, f"metrics: {url} cannot be read ({type(error).__name__}); try again later") from None
    return Response(reply.content, reply.status_code, media_type=reply.headers.get("content-type"))
