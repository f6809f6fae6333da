"""`/v1/completions` over a stand-in for the Triton model."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from stand_in_model import PROMPT, Model, posted, refusal
from starlette.testclient import TestClient

from backend import json_text
from backend.openai_server.app import create_app
from backend.openai_server.completions import Completions
from backend.openai_server.errors import bad_request
from backend.openai_server.logprobs import TextOffsets, completion_logprobs
from backend.openai_server.parameters import chat_inputs
from backend.openai_server.settings import OpenAISettings

A_TOKEN_ID = "expected a token id, an integer from 0 to 2147483647"
A_PROMPT = "expected a text or a list of token ids"


def sampling_of(**body: Any) -> list[dict]:
    """The sampling parameters of every answer that a request asks for."""
    status, answer, asked = posted(json.dumps({"model": "diffusiongemma", "prompt": PROMPT, **body}))
    assert status == 200, answer
    return [json.loads(inputs["sampling_parameters"]) for inputs in asked]


def test_log_probabilities_say_where_their_tokens_are():
    body = {"model": "m", "prompt": PROMPT, "logprobs": 0}

    async def chunks() -> list[dict]:
        return [chunk async for chunk in Completions(Model(), body).chunks()]

    whole = asyncio.run(Completions(Model(), body).whole())["choices"]
    streamed = [chunk["choices"][0] for chunk in asyncio.run(chunks())]
    text = "".join(choice["text"] for choice in streamed)
    assert text == whole[0]["text"] == " three four"
    for choices in (whole, streamed):
        places = [
            place
            for choice in choices
            for place in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True)
        ]
        assert places == [(token, text.index(token)) for token in (" three", " four")]


@pytest.mark.parametrize(
    ("parts", "places"),
    [
        ([([b"a", b"", b"b"], "ab")], [[0, 1, 1]]),  # a special token has no text
        ([([b"a"], "a"), ([b""], ""), ([b"b", b"c"], "bc")], [[0], [1], [1, 2]]),
        ([([b"a", b"", b""], "a"), ([b"b"], "b")], [[0, 1, 1], [1]]),  # at a canvas's end
        ([([b"<", b"b", b"\xf0", b"\x9f", b"\x98", b"\x80", b"c"], "<b😀c")], [[0, 1, 2, 2, 2, 2, 3]]),  # bytes of a character
        ([([b"a", b"\xf0"], "a"), ([b"\x9f", b"\x98"], ""), ([b"\x80", b"c"], "😀c")], [[0, 1], [1, 1], [1, 2]]),
        ([([b"a", b"\xff", b"\xff", b"b"], "a\ufffd\ufffdb")], [[0, 1, 2, 3]]),  # bytes of none
        ([([b"the", b" end"], "the "), ([b"\xc3\xa9"], "endé")], [[0, 3], [7]]),  # held back: it may be a stop string
        ([([b"the", b" end"], "the ")], [[0, 3]]),  # ended by a stop string within a token
        ([([b""], ""), ([], ""), ([b"a"], "a")], [[0], [], [0]]),
    ],
)
def test_places_of_tokens_in_the_text(parts, places):
    offsets, text = TextOffsets(), ""
    for (tokens, more), expected in zip(parts, places, strict=True):
        text += more
        assert offsets.next(tokens, text) == expected


@pytest.mark.parametrize("logprobs", [0, 3])
def test_log_probabilities_of_an_echoed_prompt_are_refused(logprobs):
    message, param = refusal(json.dumps({"model": "diffusiongemma", "prompt": PROMPT, "echo": True, "logprobs": logprobs}))
    assert message == f"logprobs: got {logprobs} with echo, but a prompt has no log probabilities here; remove echo"
    assert param == "logprobs"


def test_a_prompt_is_echoed_without_log_probabilities():
    for asked in ({"echo": True}, {"echo": True, "logprobs": None}):
        _, answer, [inputs] = posted(json.dumps({"model": "diffusiongemma", "prompt": PROMPT, **asked}))
        assert answer["choices"][0]["text"] == PROMPT + " three four"
        assert "echo" not in json.loads(inputs["sampling_parameters"])


def test_a_chat_is_not_echoed():
    body = {"model": "diffusiongemma", "messages": [{"role": "user", "content": "a"}]}
    for echo, shown in ((True, "true"), ("yes", "'yes'")):
        message, param = refusal(json.dumps({**body, "echo": echo}), route="chat/completions")
        assert (message, param) == (f"echo: got {shown}, but a chat is not echoed; remove it", "echo")
    assert chat_inputs({**body, "echo": False}) == chat_inputs(body)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("[1.5, 2]", f"prompt[0]: got 1.5, {A_TOKEN_ID}"),
        ('[1, "a"]', f"prompt[1]: got 'a', {A_TOKEN_ID}"),
        ("[true]", f"prompt[0]: got true, {A_TOKEN_ID}"),
        ("[5, -1]", f"prompt[1]: got -1, {A_TOKEN_ID}"),
        ('[["a"]]', f"prompt[0][0]: got 'a', {A_TOKEN_ID}"),
        ("[[1.5]]", f"prompt[0][0]: got 1.5, {A_TOKEN_ID}"),
        ('["a", [1, false]]', f"prompt[1][1]: got false, {A_TOKEN_ID}"),
        ("[[1, [2]]]", f"prompt[0][1]: got [2], {A_TOKEN_ID}"),
        ("[[2147483648]]", f"prompt[0][0]: got 2147483648, {A_TOKEN_ID}"),
        ("[null]", f"prompt[0]: got null, {A_PROMPT}"),
        ('[{"a": 1}]', f"prompt[0]: got {{'a': 1}}, {A_PROMPT}"),
        ('["a", 1]', f"prompt[1]: got 1, {A_PROMPT}"),
        ('{"a": 1}', "prompt: got {'a': 1}, expected a text, a list of token ids, or a list of either"),
        ("null", "prompt: got nothing, expected a value; add it"),
        ("[]", "prompt: got an empty list, expected at least one prompt"),
    ],
)
def test_malformed_prompts_are_refused(prompt, message):
    body = f'{{"model": "diffusiongemma", "prompt": {prompt}}}'
    assert refusal(body) == (message, message.partition(":")[0])


def test_prompts_are_texts_and_token_ids():
    for prompt, expected in (
        ("a", [{"text_input": "a"}]),
        ([0, 2147483647], [{"input_ids": [0, 2147483647]}]),
        ([[1], "a"], [{"input_ids": [1]}, {"text_input": "a"}]),
    ):
        _, _, asked = posted(json.dumps({"model": "diffusiongemma", "prompt": prompt}))
        assert [{name: inputs[name] for name in ("text_input", "input_ids") if name in inputs} for inputs in asked] == expected


@pytest.mark.parametrize("where", ['"temperature": 1e999', '"metadata": {"a": [-1e999]}', '"prompt": [1e999]'])
def test_a_number_that_is_too_large_is_refused(where):
    got = "-1e999" if "-" in where else "1e999"
    message = f"body: got {got}, which is more than numbers can be, expected a JSON object"
    assert refusal(f'{{"model": "diffusiongemma", "prompt": "a", {where}}}') == (message, "body")


@pytest.mark.parametrize(
    ("seed", "n", "seeds"),
    [(-1, 1, [2**64 - 1]), (-1, 2, [2**64 - 1, 0]), (-(2**63), 1, [2**63]), (2**64 - 1, 2, [2**64 - 1, 0]), (7, 1, [7])],
)
def test_seeds_are_64_bits_with_or_without_a_sign(seed, n, seeds):
    assert [sampling["seed"] for sampling in sampling_of(seed=seed, n=n)] == seeds


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_a_seed_of_more_bits_is_refused(seed, n):
    message, param = refusal(json.dumps({"model": "diffusiongemma", "prompt": "a", "seed": seed, "n": n}))
    assert message == f"seed: got {seed}, expected an integer from -9223372036854775808 to 18446744073709551615"
    assert param == "seed"


def test_a_bias_may_be_a_fraction():
    assert sampling_of(logit_bias={"277": 0.5, "5": -100}) == [{"logit_bias": {"277": 0.5, "5": -100}}]
    message, param = refusal('{"model": "diffusiongemma", "prompt": "a", "logit_bias": {"277": true}}')
    assert (message, param) == ("logit_bias.277: got true, expected number", "logit_bias.277")


def test_best_of_may_be_n():
    for n, best_of in ((1, 1), (3, 3), (3, 1)):
        assert sampling_of(n=n, best_of=best_of) == [{}] * n
    for asked, n in (({"best_of": 2}, 1), ({"best_of": 4, "n": 3}, 3)):
        message, param = refusal(json.dumps({"model": "diffusiongemma", "prompt": "a", **asked}))
        assert (message, param) == (f"best_of: got {asked['best_of']}, expected n, which is {n}; remove it", "best_of")


@pytest.mark.parametrize(
    ("prompt", "status", "written"),
    [
        ("a", 200, 0),
        ("\U0001f600", 200, 0),
        (r"\u00e9", 200, 0),
        (r"\ud83d\uDE00", 200, 1),
        (r"\ud83d", 400, 1),
        (r"\uDE00", 400, 1),
    ],
)
def test_a_body_is_searched_for_halves_of_characters_only_if_it_may_have_some(monkeypatch, prompt, status, written):
    """The search writes the whole body again: seconds, with the images that a body may hold."""
    written_bodies = []

    def dumps(body: object, **how: Any) -> str:
        written_bodies.append(body)
        return json.dumps(body, **how)

    ours = SimpleNamespace(loads=json.loads, dumps=dumps, JSONDecodeError=json.JSONDecodeError)
    monkeypatch.setattr(json_text, "json", ours)
    got, answer, _ = posted(f'{{"model": "diffusiongemma", "prompt": "{prompt}"}}')
    assert (got, len(written_bodies)) == (status, written)
    assert status == 200 or "surrogate" in answer["error"]["message"]


@pytest.mark.parametrize("byte", [b"\xff", b"\xed\xa0\x80"])
def test_a_body_is_utf_8(byte):
    message, _ = refusal(b'{"model": "diffusiongemma", "prompt": "' + byte + b'"}')
    assert message == "body: got bytes that are not UTF-8 (at byte 39), expected a JSON object in UTF-8"
    assert posted('\ufeff{"model": "diffusiongemma", "prompt": "a"}'.encode())[0] == 200


def test_no_depth_of_a_body_is_a_server_error():
    """What can be read cannot always be written: the stack is deeper then."""
    with TestClient(create_app(OpenAISettings(), Model()), raise_server_exceptions=False) as client:
        for where in ('"prompt": "a", "x"', '"prompt"'):
            statuses = {}
            for depth in (*range(900, 1000), 100_000):
                content = f'{{"model": "diffusiongemma", {where}: {"[" * depth + "]" * depth}}}'
                reply = client.post("/v1/completions", content=content)
                statuses[depth] = reply.status_code
            assert set(statuses.values()) <= {200, 400}, statuses
            assert reply.json()["error"]["message"] == "body: got JSON that is nested too deeply, expected a JSON object"


@pytest.mark.parametrize("says_its_length", [True, False])
def test_a_body_that_is_too_large_is_refused_before_it_is_kept(says_its_length):
    settings = OpenAISettings(max_body_bytes=1000)
    pieces_read = 0

    def pieces():
        nonlocal pieces_read
        for _ in range(1000):
            pieces_read += 1
            yield b" " * 100

    with TestClient(create_app(settings, Model())) as client:
        body = b" " * 1001 if says_its_length else pieces()
        refused = client.post("/v1/completions", content=body)
        assert refused.status_code == 413
        [message] = refused.json()["error"]["message"].splitlines()
        assert message == "body: got more than 1000 bytes, expected at most these; send fewer or smaller images"
        served = client.post("/v1/completions", json={"model": "diffusiongemma", "prompt": PROMPT})
        assert served.json()["choices"][0]["text"] == " three four"


def test_choices_that_would_need_a_large_body_many_times_are_refused():
    settings, asked = OpenAISettings(max_body_bytes=1000), {"model": "diffusiongemma", "prompt": "a" * 500}
    with TestClient(create_app(settings, Model())) as client:
        length = len(json.dumps({**asked, "n": 2}, separators=(",", ":")))
        refused = client.post("/v1/completions", json={**asked, "n": 2})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "n"
        [message] = refused.json()["error"]["message"].splitlines()
        assert message == f"n: got 2 choices of {length} bytes, expected at most 1000 bytes in all; send several requests"
        for served in ({**asked, "n": 1}, {**asked, "prompt": "a", "n": 8}):
            assert client.post("/v1/completions", json=served).status_code == 200


def test_the_model_is_told_how_many_choices_there_are():
    """It knows how many there could ever be at once."""
    for asked, num_choices in (({"n": 3}, 3), ({"n": 2, "prompt": ["a", "b"]}, 4), ({}, None)):
        _, _, told = posted(json.dumps({"model": "diffusiongemma", "prompt": "a", **asked}))
        assert [inputs.get("num_choices") for inputs in told] == [num_choices] * (num_choices or 1)


def test_a_client_that_goes_while_it_sends_is_no_error_of_the_server():
    sent = []
    arriving = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> dict:
        return next(arriving)

    async def send(message: dict) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    asyncio.run(create_app(OpenAISettings(), Model())({**scope, "raw_path": b"", "root_path": ""}, receive, send))
    assert sent[0]["status"] == 499


def test_of_alternatives_that_print_alike_the_most_likely_is_named():
    alternatives = [
        {"token": "\ufffd", "logprob": -1.0, "bytes": [0xC3]},
        {"token": "a", "logprob": -2.0, "bytes": [0x61]},
        {"token": "\ufffd", "logprob": -3.0, "bytes": [0xC4]},
    ]
    entry = {"token": "a", "logprob": -2.0, "bytes": [0x61], "top_logprobs": alternatives}
    assert completion_logprobs([entry], "a", TextOffsets()).top_logprobs == [{"\ufffd": -1.0, "a": -2.0}]


def test_the_parameter_at_fault_is_named_without_its_value():
    assert bad_request("length_penalty=2: not supported by this server; remove it").param == "length_penalty"
    assert bad_request("seed: got 1.5, expected an integer").param == "seed"
    assert bad_request("logit_bias of token id 5: got 200, expected a finite number").param == "logit_bias"
    assert bad_request("max_tokens and max_new_tokens: both given, but mean the same; remove one").param == "max_tokens"
    assert bad_request("logprobs=1 and top_logprobs=2: differ; give one number").param == "logprobs"
    assert bad_request("messages[1].content: got 5, expected string").param == "messages[1].content"
    assert bad_request("unknown sampling parameter 'top k' (closest: 'top_k'); expected seed").param == "top k"
    assert bad_request("messages: got nothing, expected a value; add it").param == "messages"
    assert bad_request("body: got malformed JSON, expected a JSON object").param == "body"
    assert bad_request("the server refuses it").param is None
