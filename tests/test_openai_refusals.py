"""What the OpenAI front end refuses by itself, over a stand-in for the Triton model."""

import json

import pytest
from stand_in_model import Model, posted, refusal
from starlette.testclient import TestClient

from backend.openai_server.app import create_app
from backend.openai_server.settings import OpenAISettings

CHAT = {"model": "diffusiongemma", "messages": [{"role": "user", "content": "a"}]}
COMPLETION = {"model": "diffusiongemma", "prompt": "a"}
ROUTES = "POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /v1/models/{name}, GET /health, GET /metrics"


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(OpenAISettings(), Model())) as connected:
        yield connected


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("POST", "/chat/completions", "expected /v1/chat/completions; is /v1 missing from base_url?"),
        ("GET", "/models/diffusiongemma", "expected /v1/models/diffusiongemma; is /v1 missing from base_url?"),
        ("POST", "/v1/responses", f"expected one of {ROUTES}"),
        ("GET", "/v1/chat", f"expected one of {ROUTES}"),
        ("GET", "/", f"expected one of {ROUTES}"),
    ],
)
def test_a_route_that_there_is_not(client, method, path, message):
    reply = client.request(method, path)
    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == f"{method} {path}: no such route, {message}"


def test_a_path_is_shown_in_one_short_line(client):
    message = client.get("/a%0Ab" + "c" * 1000).json()["error"]["message"]
    assert message.startswith("GET /abccc") and "ccc...: no such route" in message and "\n" not in message


@pytest.mark.parametrize(("method", "path", "has"), [("GET", "/v1/chat/completions", "POST"), ("POST", "/health", "GET")])
def test_a_method_that_a_route_has_not(client, method, path, has):
    reply = client.request(method, path)
    assert (reply.status_code, reply.headers["allow"]) == (405, has)
    assert reply.json()["error"]["message"] == f"{method} {path}: no such method, expected {has}"


@pytest.mark.parametrize(("route", "body"), [("chat/completions", CHAT), ("completions", COMPLETION)])
def test_stream_options_are_for_streams(route, body):
    options = {"stream_options": {"include_usage": True}}
    for asked in (options, {**options, "stream": False}):
        message, param = refusal(json.dumps({**body, **asked}), route=route)
        expected = "got {'include_usage': True} without stream; set stream to true, or remove it"
        assert (message, param) == (f"stream_options: {expected}", "stream_options")
    assert posted(json.dumps({**body, "stream_options": None}), route=route)[0] == 200


def test_nothing_is_stored():
    message, param = refusal(json.dumps({**CHAT, "store": True}), route="chat/completions")
    assert (message, param) == ("store: got True, but this server does not have it; remove it", "store")
    for nothing in (False, None):
        assert posted(json.dumps({**CHAT, "store": nothing}), route="chat/completions")[0] == 200


@pytest.mark.parametrize("logprobs", [21, -1])
def test_a_completion_has_its_number_of_log_probabilities_refused_by_its_own_name(logprobs):
    message, param = refusal(json.dumps({**COMPLETION, "logprobs": logprobs}))
    assert (message, param) == (f"logprobs: got {logprobs}, expected an integer from 0 to 20", "logprobs")


def test_what_is_missing_is_named():
    message, param = refusal('{"model": "diffusiongemma"}', route="chat/completions")
    assert (message, param) == ("body: got no messages, expected one; add it", "messages")
