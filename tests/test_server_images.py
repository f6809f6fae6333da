"""The path of an image proves itself: drawn figures through gRPC and through OpenAI's client, and images that are refused."""

import base64
import io
import itertools
import json
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import tritonclient.grpc as grpcclient
from openai import OpenAI
from PIL import Image
from server_clients import ANY_PORTS, ENDLESS, NO_PROXY, QUESTION, Refused, Stream, ask, ask_once, metrics, tensors
from test_image_decoding import BOMB
from tiny_figures import ASKED, figure_questions
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from waiting import wait_until

from backend.openai_server.launch import FrontEnd
from backend.openai_server.settings import OpenAISettings
from backend.triton_server.launch import MODEL_NAME, TritonServer

NUM_FIGURES = 100
MIN_RIGHT = 95
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
FIGURES = list(itertools.islice(figure_questions(2026, held_out=True), NUM_FIGURES))


@pytest.fixture(scope="module")
def server(engine_dir) -> Iterator[TritonServer]:
    parameters = {"fetch_images": "true", "max_sequences": "8", "image_memory_bytes": str(128 * 1024**2)}
    with TritonServer(engine_dir=engine_dir, parameters=parameters, **ANY_PORTS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server, tmp_path_factory) -> Iterator[OpenAI]:
    settings = OpenAISettings(triton_urls=(server.grpc_url,), port=0)
    log = tmp_path_factory.mktemp("front") / "openai.log"
    with FrontEnd(settings, log) as front, OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0) as connected:
        yield connected


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    written = io.BytesIO()
    image.save(written, kind)
    return base64.b64encode(written.getvalue()).decode()


def data_url(data: bytes | str) -> str:
    return "data:image/png;base64," + (data if isinstance(data, str) else base64.b64encode(data).decode())


def with_url(*urls: str) -> list[dict]:
    """A chat that asks for the color of the figure at each of `urls`."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": ASKED}]}]


def wrong(answers: list[str]) -> list[tuple[str, str]]:
    pairs = [(question.answer, answer) for (question, _), answer in zip(FIGURES, answers, strict=True)]
    return [pair for pair in pairs if pair[0] != pair[1]]


def test_figures_through_grpc(server):
    """All at once over one stream, every format in turn; the images go beside the messages."""
    arrived: queue.Queue = queue.Queue()
    with grpcclient.InferenceServerClient(server.grpc_url, channel_args=NO_PROXY) as connected:
        connected.start_stream(lambda result, error: arrived.put((result, error)))
        for index, (question, image) in enumerate(FIGURES):
            inputs = tensors(messages=json.dumps(question.messages), image=encoded(image, FORMATS[index % 4]), seed=index)
            connected.async_stream_infer(MODEL_NAME, inputs, request_id=str(index))
        answers = [""] * NUM_FIGURES
        for _ in FIGURES:
            result, error = arrived.get(timeout=300)
            assert error is None, error
            answers[int(result.get_response().id)] = result.as_numpy("text_output")[0].decode()
        connected.stop_stream()
    print(f"{NUM_FIGURES - len(wrong(answers))} of {NUM_FIGURES} held-out figures answered exactly")
    assert len(wrong(answers)) <= NUM_FIGURES - MIN_RIGHT, wrong(answers)


def test_figures_through_openais_client(client):
    def ask_about(index: int) -> str:
        messages = with_url(data_url(encoded(FIGURES[index][1])))
        return client.chat.completions.create(model=MODEL_NAME, messages=messages, seed=index).choices[0].message.content

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask_about, range(NUM_FIGURES)))
    assert len(wrong(answers)) <= NUM_FIGURES - MIN_RIGHT, wrong(answers)


def test_an_image_takes_the_tokens_that_transformers_gives_it(server, client, chat_tokenizer):
    question, image = FIGURES[0]
    prompt = chat_tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
    [num_soft_tokens] = Gemma4ImageProcessorPil(max_soft_tokens=70)(image)["num_soft_tokens_per_image"]
    expected = len(chat_tokenizer(prompt, add_special_tokens=False).input_ids) + num_soft_tokens + 1
    completion = client.chat.completions.create(model=MODEL_NAME, messages=with_url(data_url(encoded(image))), seed=1)
    assert completion.usage.prompt_tokens == expected
    beside = ask_once(server.grpc_url, messages=json.dumps(question.messages), image=encoded(image), seed=1)
    raw = ask_once(server.grpc_url, text_input=prompt, image=encoded(image), seed=1)
    ids = chat_tokenizer(prompt, add_special_tokens=False).input_ids
    as_ids = ask_once(server.grpc_url, input_ids=ids, image=data_url(encoded(image)), seed=1)
    assert [each.num_input_tokens for each in (beside, raw, as_ids)] == [expected] * 3
    assert beside.token_ids == raw.token_ids == as_ids.token_ids
    assert beside.text == completion.choices[0].message.content


def test_a_stream_and_an_image_of_an_earlier_turn(client):
    question, image = FIGURES[0]
    turns = [*with_url(data_url(encoded(image))), {"role": "assistant", "content": question.answer}]
    turns.append({"role": "user", "content": "Add 17 and 25."})
    chunks = list(client.chat.completions.create(model=MODEL_NAME, messages=turns, seed=1, stream=True))
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_requests_that_go_while_their_images_load_leave_no_memory_behind(server):
    """Three of these images fit into half of image_memory_bytes, so that one that stays counted is noticed."""
    noise = Image.merge("RGB", [Image.effect_noise((2200, 2200), 64) for _ in range(3)])
    large = json.dumps(with_url(data_url(encoded(noise))))
    for _ in range(4):
        stream = Stream(server.grpc_url, messages=large, stream=True)
        stream.close(cancel=True)
        wait_until(lambda: metrics(server.metrics_url, "diffusiongemma_active_requests") == 0)
    assert ask_once(server.grpc_url, messages=large, max_tokens=1, seed=1).num_output_tokens == 1


PNG = base64.b64decode(encoded(FIGURES[0][1]))
BAD_IMAGES = {
    "truncated": ([data_url(PNG[: len(PNG) // 2])], ["image[0]: got a damaged file"]),
    "a bomb": ([data_url(BOMB)], ["image[0]: got", "pixels, expected at most 50000000"]),
    "no image": ([data_url(b"hello")], ["image[0]: got 5 bytes that are no image", "PNG, JPEG, WEBP, GIF"]),
    "no base64": (["data:image/png;base64,!"], ["image[0]: got malformed base64"]),
    "too large a file": ([data_url(bytes(20 * 1024**2 + 1))], ["image[0]: got", "bytes, expected at most 20971520"]),
    "too many": ([data_url(PNG)] * 8, ["images: got 8, expected at most 7"]),
    "a private URL": (["http://169.254.169.254/latest"], ["image[0]: got the host '169.254.169.254'", "public addresses"]),
    "this very host": (["http://localhost:8000/v2"], ["image[0]: got the host 'localhost'", "public addresses"]),
    "a file": (["file:///etc/passwd"], ["image[0]: got the URL 'file:///etc/passwd'", "http or https"]),
    "the second one": ([data_url(PNG), data_url(b"hello")], ["image[1]: got 5 bytes"]),
}


@pytest.fixture(scope="module")
def going_on(server) -> Iterator[Stream]:
    """A request that is under way while others are refused."""
    stream = Stream(server.grpc_url, text_input=QUESTION, stream=True, **ENDLESS)
    assert stream.goes_on(responses=1)
    yield stream
    stream.close(cancel=True)


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_refused_in_one_line_and_disturbs_nothing(server, client, going_on, case):
    urls, words = BAD_IMAGES[case]
    with pytest.raises(openai.BadRequestError) as over_openai:
        client.chat.completions.create(model=MODEL_NAME, messages=with_url(*urls), seed=1)
    line = over_openai.value.body["message"]
    with pytest.raises(Refused) as over_grpc:
        ask(server.grpc_url, messages=json.dumps(with_url(*urls)), request_id="r1")
    assert str(over_grpc.value) == f"[request id: r1] [INVALID_ARGUMENT] {line}"
    assert "\n" not in line and len(line) < 300
    assert [word for word in words if word not in line] == []
    assert going_on.goes_on(responses=1)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"text_input": "<bos><|image|>"}, ["1 image placeholders", "0 images"]),
        ({"text_input": "<bos>none", "image": data_url(PNG)}, ["0 image placeholders", "1 images"]),
        ({"text_input": "<bos><|image|><|image|>", "image": data_url(PNG)}, ["2 image placeholders", "1 images"]),
        ({"messages": json.dumps(FIGURES[0][0].messages)}, ["got 0 images, expected 1"]),
        ({"text_input": "<bos><|image|>", "image": b"\xff\xd8"}, ["image: got bytes that are not UTF-8"]),
    ],
)
def test_images_and_their_places_must_agree(server, inputs, words):
    with pytest.raises(Refused) as caught:
        ask(server.grpc_url, **inputs)
    assert [word for word in words if word not in str(caught.value)] == []
