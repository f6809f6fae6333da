"""What the OpenAI front end refuses by itself, over a stand-in for the Triton model."""

import json
import re
from dataclasses import replace

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from stand_in_model import Model, posted, refusal
from starlette.testclient import TestClient

from backend.openai_server.app import create_app
from backend.openai_server.errors import bad_request
from backend.openai_server.settings import OpenAISettings, checked_origins
from backend.parameters import shown

CHAT = {"model": "diffusiongemma", "messages": [{"role": "user", "content": "a"}]}
COMPLETION = {"model": "diffusiongemma", "prompt": "a"}
ROUTES = ", ".join(
    [
        *("POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses"),
        *("GET /v1/models", "GET /v1/models/{name}", "GET /health", "GET /metrics"),
    ]
)


@pytest.fixture(scope="module")
def client():
    with TestClient(create_app(OpenAISettings(), Model())) as connected:
        yield connected


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("POST", "/chat/completions", "expected /v1/chat/completions; is /v1 missing from base_url?"),
        ("GET", "/models/diffusiongemma", "expected /v1/models/diffusiongemma; is /v1 missing from base_url?"),
        ("POST", "/v1/chat/completions/", f"expected one of {ROUTES}"),
        ("GET", "/v1/responses/resp_1", f"expected one of {ROUTES}"),
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
    assert (message, param) == ("store: got true, but this server does not have it; remove it", "store")
    for nothing in (False, None):
        assert posted(json.dumps({**CHAT, "store": nothing}), route="chat/completions")[0] == 200


@pytest.mark.parametrize("logprobs", [21, -1])
def test_a_completion_has_its_number_of_log_probabilities_refused_by_its_own_name(logprobs):
    message, param = refusal(json.dumps({**COMPLETION, "logprobs": logprobs}))
    assert (message, param) == (f"logprobs: got {logprobs}, expected an integer from 0 to 20", "logprobs")


@pytest.mark.parametrize("body", ['{"model": "diffusiongemma"}', '{"model": "diffusiongemma", "messages": null}'])
def test_what_is_missing_is_named(body):
    message, param = refusal(body, route="chat/completions")
    assert (message, param) == ("messages: got nothing, expected a value; add it", "messages")


@pytest.mark.parametrize(
    ("route", "body", "known"),
    [("chat/completions", CHAT, ChatParams.__annotations__), ("completions", COMPLETION, CompletionParams.__annotations__)],
)
def test_what_is_null_is_as_if_it_were_not_there(route, body, known):
    """Clients that write all of a record send it so."""
    nothing = dict.fromkeys({*known, "stream", "top_k", "what there is not"} - set(body))
    status, answer, asked = posted(json.dumps({**nothing, **body}), route=route)
    assert status == 200, answer
    assert asked == posted(json.dumps(body), route=route)[2]


def test_what_is_null_in_a_response_format_is_as_if_it_were_not_there():
    described = {"name": "a", "schema": {}, "strict": None, "description": None}
    for kind, schema in (("text", None), ("json_object", None), ("json_schema", described)):
        asked = {"type": kind, "json_schema": schema, "structural_tag": None}
        assert posted(json.dumps({**CHAT, "response_format": asked}), route="chat/completions")[0] == 200


def test_what_is_null_in_a_schema_is_part_of_it():
    for schema in ({"const": None}, {"properties": {"a": {"default": None}}, "enum": [None]}):
        asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        [inputs] = posted(json.dumps({**CHAT, "response_format": asked}), route="chat/completions")[2]
        assert json.loads(inputs["sampling_parameters"]) == {"structured_outputs": {"json": schema}}


@pytest.mark.parametrize(("route", "body"), [("chat/completions", CHAT), ("completions", COMPLETION)])
def test_what_is_null_in_stream_options_is_as_if_it_were_not_there(client, route, body):
    reply = client.post(f"/v1/{route}", json={**body, "stream": True, "stream_options": {"include_usage": None}})
    assert reply.status_code == 200 and '"usage"' not in reply.text


def test_functions_of_old_clients_ask_for_nothing_when_there_are_none():
    nothing = {"functions": [], "function_call": "none"}
    assert posted(json.dumps({**CHAT, **nothing}), route="chat/completions")[0] == 200
    for asked in ({"functions": [{"name": "f"}]}, {"function_call": "auto"}):
        assert refusal(json.dumps({**CHAT, **asked}), route="chat/completions")[1] in asked


def test_a_key_of_the_clients_own_does_not_break_the_line():
    message = refusal(json.dumps({**CHAT, "metadata": {"a\nb": 1}}), route="chat/completions")
    assert message == ("metadata: got 1 at 'a\\nb', expected string", "metadata")


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ({"model": 5}, "model: got 5, expected string"),
        ({"seed": True}, "seed: got true, expected integer"),
        ({"logit_bias": [1]}, "logit_bias: got [1], expected a JSON object"),
        ({"chat_template_kwargs": "a"}, "chat_template_kwargs: got 'a', expected a JSON object"),
        ({"prediction": {"type": "text"}}, "prediction.type: got 'text', expected 'content'"),
    ],
)
def test_messages_have_the_words_of_json(parameter, message):
    assert refusal(json.dumps({**CHAT, **parameter}), route="chat/completions") == (message, message.partition(":")[0])


@pytest.mark.parametrize(("effort", "thinks"), [("none", False), ("minimal", False), ("low", True)])
def test_a_contradiction_about_thinking_is_refused(effort, thinks):
    asked = {**CHAT, "reasoning_effort": effort}
    for more in ({}, {"chat_template_kwargs": {"enable_thinking": thinks}}):
        _, _, [inputs] = posted(json.dumps({**asked, **more}), route="chat/completions")
        assert json.loads(inputs["chat_template_kwargs"]) == {"enable_thinking": thinks}
    opposite = {"chat_template_kwargs": {"enable_thinking": not thinks}}
    message, param = refusal(json.dumps({**asked, **opposite}), route="chat/completions")
    contrary = f"chat_template_kwargs.enable_thinking is {json.dumps(not thinks)}"
    assert (message, param) == (f"reasoning_effort: got '{effort}', but {contrary}; remove one", "reasoning_effort")


TOOL = {"type": "function", "function": {"name": "f"}}
STRUCTURE = {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (STRUCTURE, "response_format and structured_outputs: both given, but each says what the answer is; remove one"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema: got none, expected a JSON schema, an object",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema: got nothing, expected a value; add it",
        ),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type: got 'xml', expected 'text' or 'json_schema' or 'json_object'",
        ),
        (
            {"response_format": {"type": "json_object", "schema": {"type": "object"}}},
            "response_format: got the key 'schema' with type 'json_object', expected type alone; remove it",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}, "a\nb": 1}},
            "response_format: got the key 'a\\nb' with type 'json_schema', expected type and json_schema alone; remove it",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}},
            "tool_choice.function: got nothing, expected a value; add it",
        ),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
def test_an_answer_is_described_once_and_wholly(parameters, message):
    assert refusal(json.dumps({**CHAT, **parameters}), route="chat/completions") == (message, re.match(r"[\w.]+", message)[0])


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"tools": [TOOL], "parallel_tool_calls": False}, {"parallel_tool_calls": False}),
        ({"tools": [TOOL], "parallel_tool_calls": True}, {}),
        ({"parallel_tool_calls": False}, {}),
    ],
)
def test_the_model_is_told_to_end_with_its_first_call(asked, told):
    status, _, [inputs] = posted(json.dumps({**CHAT, **asked}), route="chat/completions")
    assert status == 200 and json.loads(inputs["sampling_parameters"]) == {}
    assert {name: value for name, value in inputs.items() if name == "parallel_tool_calls"} == told


def test_the_usual_verbosity_is_accepted():
    assert posted(json.dumps({**CHAT, "verbosity": "medium"}), route="chat/completions")[0] == 200
    assert refusal(json.dumps({**CHAT, "verbosity": "low"}), route="chat/completions")[1] == "verbosity"


@pytest.mark.parametrize(
    ("asked", "line", "message"),
    [
        ({"max_completion_tokens": 0}, "max_tokens: got 0", "max_completion_tokens: got 0"),
        ({"max_tokens": 0}, "max_tokens: got 0", "max_tokens: got 0"),
        ({"response_format": {"type": "json_object"}}, "structured_outputs: no", "response_format: no"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
            "structured_outputs.json: got {}",
            "response_format.json_schema.schema: got {}",
        ),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs: no", "structured_outputs: no"),
        (
            {"structured_outputs": {"regex": "("}, "response_format": {"type": "text"}},
            "structured_outputs: no",
            "structured_outputs: no",
        ),
        (
            {"max_completion_tokens": 2},
            "min_tokens: got 3, expected at most max_tokens, 2; raise that",
            "min_tokens: got 3, expected at most max_completion_tokens, 2; raise that",
        ),
        (
            {"max_completion_tokens": 2},
            "prompt: got 9 tokens and max_tokens 2, too much; shorten the prompt or lower max_tokens",
            "messages: got 9 tokens and max_completion_tokens 2, too much; shorten the prompt or lower max_completion_tokens",
        ),
        (
            {"response_format": {"type": "json_object"}},
            "min_tokens and structured_outputs: both given, but structured_outputs may end the answer sooner; remove one",
            "min_tokens and response_format: both given, but response_format may end the answer sooner; remove one",
        ),
        ({}, "prompt: got no tokens", "messages: got no tokens"),
        ({}, "tools: too many", "tools: too many"),
    ],
)
def test_what_the_model_refuses_has_the_clients_name(asked, line, message):
    class Refusing(Model):
        async def generate(self, inputs, request_id):
            raise bad_request(line)
            yield

    with TestClient(create_app(OpenAISettings(), Refusing())) as client:
        error = client.post("/v1/chat/completions", json={**CHAT, **asked}).json()["error"]
    assert (error["message"], error["param"]) == (message, re.match(r"[\w.]+", message)[0])


def test_what_the_client_sent_is_shown_as_it_was():
    for sent in ("max_tokens", 'it\'s "max_tokens"', {"a": ["\\'max_tokens"]}, "max_tokens " * 9):
        line = f"infill: got {shown(sent)}, expected at most the server's max_tokens, not max_tokens_a"
        renamed = bad_request(line).renamed({"max_tokens": "max_output_tokens"})
        assert str(renamed) == line.replace("server's max_tokens", "server's max_output_tokens")


@pytest.mark.parametrize(
    ("route", "body", "param"), [("chat/completions", CHAT, "messages"), ("completions", COMPLETION, "prompt")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for(route, body, param, stream):
    class Full(Model):
        async def generate(self, inputs, request_id):
            raise bad_request("prompt: got 9000 tokens and max_tokens 256, which is too much")
            yield

    with TestClient(create_app(OpenAISettings(), Full())) as client:
        reply = client.post(f"/v1/{route}", json={**body, "stream": stream})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert reply.headers["x-request-id"].startswith(("chatcmpl-", "cmpl-"))


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/models", None, 200),
        ("GET", "/v1/nowhere", None, 404),
        ("GET", "/v1/completions", None, 405),
        ("POST", "/v1/completions", {}, 400),
        ("GET", "/health", None, 500),  # the stand-in cannot say whether it is ready
    ],
)
def test_every_response_has_an_id_of_its_own(method, path, body, status):
    with TestClient(create_app(OpenAISettings(), Model()), raise_server_exceptions=False) as client:
        replies = [client.request(method, path, json=body) for _ in range(2)]
    ids = [reply.headers["x-request-id"] for reply in replies]
    assert [reply.status_code for reply in replies] == [status] * 2
    assert all(each.startswith("req-") for each in ids) and len(set(ids)) == 2


@pytest.mark.parametrize(("route", "body"), [("chat/completions", CHAT), ("completions", COMPLETION)])
def test_an_event_is_one_line_for_every_client(route, body):
    """Also for those that take more than carriage returns and line feeds for its end, as httpx's `iter_lines` does."""
    text = "a\u2028b\u2029c\x85d\x0be\x1cf\ré"

    class Separating(Model):
        async def generate(self, inputs, request_id):
            async for part in super().generate(inputs, request_id):
                yield replace(part, text=text if part.finish_reason else "", logprobs=None)

    asked = {"json": {**body, "stream": True}}
    with (
        TestClient(create_app(OpenAISettings(), Separating())) as client,
        client.stream("POST", f"/v1/{route}", **asked) as reply,
    ):
        events = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    assert "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices) == text


@pytest.mark.parametrize(("route", "body"), [("chat/completions", CHAT), ("completions", COMPLETION)])
def test_a_completions_response_has_its_id(client, route, body):
    reply = client.post(f"/v1/{route}", json=body)
    assert reply.headers["x-request-id"] == reply.json()["id"]
    streamed = client.post(f"/v1/{route}", json={**body, "stream": True})
    first = json.loads(streamed.text.partition("\n")[0].removeprefix("data: "))
    assert streamed.headers["x-request-id"] == first["id"]


@pytest.mark.parametrize(("sent", "status"), [("schlüssel", 200), ("schlussel", 401), ("\x00ü", 401)])
def test_a_key_may_have_any_characters(sent, status):
    with TestClient(create_app(OpenAISettings(api_keys=("schlüssel",)), Model())) as client:
        reply = client.get("/v1/models", headers={"authorization": f"Bearer {sent}".encode()})
    assert reply.status_code == status


# -- Pages in a browser

PAGE = "https://chat.example.com"


def preflight(origin: str, method: str = "POST") -> dict[str, str]:
    """What a browser asks before it lets a page's OpenAI client post."""
    wanted = {"method": method, "headers": "authorization,content-type,x-stainless-lang"}
    return {"origin": origin} | {f"access-control-request-{name}": value for name, value in wanted.items()}


@pytest.mark.parametrize(("origins", "named"), [((PAGE, "http://localhost:3000"), PAGE), (("*",), "*")])
def test_a_page_of_an_allowed_origin_may_call(origins, named):
    settings = OpenAISettings(allowed_origins=origins, api_keys=("a key",))
    key, stream = {"authorization": "Bearer a key"}, {"stream": True}
    with TestClient(create_app(settings, Model()), raise_server_exceptions=False, headers={"origin": PAGE}) as client:
        asked = client.options("/v1/chat/completions", headers=preflight(PAGE))
        replies = {
            200: client.post("/v1/chat/completions", json={**CHAT, **stream}, headers=key),
            400: client.post("/v1/chat/completions", json={}, headers=key),
            401: client.post("/v1/chat/completions", json=CHAT),
            404: client.get("/v1/nowhere"),
            500: client.get("/health"),  # the stand-in cannot say whether it is ready
        }
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == named
    assert asked.headers["access-control-allow-headers"] == preflight(PAGE)["access-control-request-headers"]
    assert replies[200].text.endswith("data: [DONE]\n\n")
    for status, reply in replies.items():
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (status, named)
        assert reply.headers["access-control-expose-headers"] == "x-request-id"
        assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize(("origins", "status"), [((PAGE,), 400), ((), 405)])
def test_another_page_may_not_call(origins, status):
    elsewhere = "https://elsewhere.example.com"
    with TestClient(create_app(OpenAISettings(allowed_origins=origins), Model())) as client:
        asked = client.options("/v1/chat/completions", headers=preflight(elsewhere))
        reply = client.get("/v1/models", headers={"origin": elsewhere})
        posted = client.post("/v1/chat/completions", json=CHAT, headers={"origin": elsewhere})
        of_its_own = client.post("/v1/chat/completions", json=CHAT, headers={"origin": str(client.base_url)})
    assert (asked.status_code, reply.status_code) == (status, 200)
    assert (posted.status_code, of_its_own.status_code) == (403, 200)
    assert posted.json()["error"]["message"].startswith(f"origin: got '{elsewhere}', expected a page that may call; start")
    assert "access-control-allow-origin" not in {**asked.headers, **reply.headers}


def test_only_what_browsers_send_is_an_origin():
    known = ("*", PAGE, "http://localhost:3000", "http://[::1]:8080", "https://a.example:80", "chrome-extension://abcdef")
    assert checked_origins(known) == known
    for wrong in (
        *("", "null", "localhost:3000", "chat.example.com", "https://", f"{PAGE}/", f"{PAGE}/chat", f"{PAGE},http://a"),
        *("https://Chat.example.com", "https://*.example.com", f"{PAGE}:443", "http://a:80", "http://user@a", "http://a\n"),
    ):
        with pytest.raises(ValueError, match=r"^--allowed-origin: got '.*', expected scheme://host .*, or \*$"):
            checked_origins([wrong])
