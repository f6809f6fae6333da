"""What a client is told that asks for a route, or a method of one, that there is not."""

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.routing import Match

from backend.openai_server.errors import ApiError
from backend.parameters import shown

_PREFIX = "/v1"


def no_such_route(app: FastAPI, request: Request) -> ApiError:
    """404. Names the route that is there under /v1, else all that there are."""
    path = request.url.path
    meant = _PREFIX + path
    if any(_matches(route, meant) for route in _routes(app)):
        expected = f"{_shown(meant)}; is {_PREFIX} missing from base_url?"
    else:
        expected = "one of " + ", ".join(f"{' or '.join(sorted(each.methods))} {each.path_format}" for each in _routes(app))
    return ApiError(404, f"{_shown(f'{request.method} {path}')}: no such route, expected {expected}")


def no_such_method(request: Request, allowed: str) -> ApiError:
    """405. allowed: the methods that the route has."""
    return ApiError(405, f"{_shown(f'{request.method} {request.url.path}')}: no such method, expected {allowed}")


def _routes(app: FastAPI) -> list[APIRoute]:
    return [each for each in app.routes if isinstance(each, APIRoute)]


def _matches(route: APIRoute, path: str) -> bool:
    return route.matches({"type": "http", "method": "GET", "path": path})[0] is not Match.NONE


def _shown(text: str) -> str:
    return shown(text).strip("'\"")
