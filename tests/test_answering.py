"""The answering thread of the model in a server's Python backend, with stand-ins for the server and the service."""

import queue
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from waiting import wait_until

from backend.errors import RequestError
from backend.job import CanvasOutput
from backend.metrics import MetricValues, Series
from backend.sampling_config import SamplingConfig
from backend.triton_server.request import GenerationRequest


class TritonError(str):
    INTERNAL = INVALID_ARG = UNAVAILABLE = 1

    def __new__(cls, line: str, code: int):
        return super().__new__(cls, line)


class Sender:
    """A response sender; `fails`: how many sends in a row fail, as when the server has no shared memory left."""

    def __init__(self, fails: int = 0):
        self.sent, self.fails, self.cancelled = [], fails, False

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, response=None, flags: int = 0) -> None:
        if self.fails:
            self.fails -= 1
            raise RuntimeError("no shared memory")
        self.sent.append((response, flags))


@pytest.fixture
def server_model(monkeypatch):
    """`backend.triton_server.model`, imported with a stand-in for the module that only a server has."""
    utils = SimpleNamespace(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        Tensor=lambda name, array: (name, array),
        InferenceResponse=lambda tensors=(), error=None: error or tensors,
        TritonError=TritonError,
        Logger=SimpleNamespace(log_error=lambda line: None),
        TritonModelException=RuntimeError,
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    for name in ("model", "response", "exported_metrics"):
        monkeypatch.delitem(sys.modules, f"backend.triton_server.{name}", raising=False)
    from backend.triton_server import model

    yield model
    for name in ("model", "response", "exported_metrics"):
        sys.modules.pop(f"backend.triton_server.{name}", None)


@pytest.fixture
def answering(server_model):
    """A model whose answering thread runs; `cancelled` are the handles that the service was told to end, `released` the answers
    whose images are no longer held, `submitted` the images that the service got; it refuses those of "bad"; `announced` are
    the answers that have a place in its queue, which has two; those that are `overdue` have had it for too long."""
    model = server_model.DiffusionGemmaModel()
    model.cancelled, model.released, model.submitted, model.announced, model.overdue = [], [], [], {}, []

    def submit(prompt, sampling, on_output, *, images=(), **choices):
        if images == ("bad",):
            raise RequestError("INVALID_ARGUMENT", "prompt: got no place for an image")
        model.submitted.append((prompt, images))
        model.announced.pop(choices["owner"], None)
        return 9

    def announce(owner, arrived_at_s):
        if len(model.announced) == 2:
            raise RequestError("UNAVAILABLE", "queue: got 2 waiting requests, at most 2; try again later")
        model.announced[owner] = arrived_at_s

    def withdraw(owner):
        model.announced.pop(owner, None)

    def tokens(prompt):
        if prompt == "half":
            raise RequestError("INVALID_ARGUMENT", "prompt: got half of a surrogate pair")
        return [len(prompt), threading.get_ident()]

    def overdue(owner):
        return late if owner in model.overdue else None

    late = RequestError("DEADLINE_EXCEEDED", "queue: waited 61 s, at most 60 s; try again later")
    queued = {
        "submit": submit,
        "announce": announce,
        "withdraw": withdraw,
        "cancel": model.cancelled.append,
        "overdue": overdue,
    }
    model._service = SimpleNamespace(**queued, tokens=tokens, tokenizer=None)
    model._max_requests = 2
    model._closing, model._template, model._settings = False, None, SimpleNamespace(default_max_tokens=0)
    model._images = SimpleNamespace(release=model.released.append)
    model._events, model._metrics = queue.SimpleQueue(), MetricValues()
    model._exported = SimpleNamespace(apply=lambda delta: None, clear_gauges=lambda: None)
    thread = threading.Thread(target=model._answer_until_closed, daemon=True)
    thread.start()
    yield model
    model._events.put((None, server_model._CLOSED))
    thread.join(timeout=60)
    assert not thread.is_alive()


def accepted(server_model, model, sender: Sender, handle: int | None, images: tuple[str, ...] = (), prompt: str = "abc"):
    request = GenerationRequest(request_id="7", prompt=prompt, images=images, stream=True, sampling=SamplingConfig())
    answer = server_model.Answer(sender, request, tokenizer=None, is_made_ready=bool(images))
    answer.handle = handle
    model._events.put((answer, server_model._ACCEPTED))
    return answer


def canvas(finish_reason: str | None) -> CanvasOutput:
    return CanvasOutput(text="a", token_ids=[1], canvas_index=0, num_steps=1, finish_reason=finish_reason, num_prompt_tokens=1)


@pytest.mark.parametrize("fails", [1, 2])
def test_an_answer_that_cannot_be_sent_ends_alone(server_model, answering, monkeypatch, fails):
    """Also when not even the error can be sent; the engine does not go on with it."""
    counted = []
    monkeypatch.setattr(answering._metrics, "count", lambda name, label_value: counted.append(Series(name, label_value)))
    broken, good = Sender(fails), Sender()
    answer = accepted(server_model, answering, broken, handle=5)
    other = accepted(server_model, answering, good, handle=6)
    answering._events.put((answer, canvas(None)))
    answering._events.put((other, canvas("stop")))
    wait_until(lambda: other.finished)
    assert answer.finished and answering.cancelled == [5]
    assert [flags for _, flags in good.sent] == [0, 1]
    line = "[request id: 7] [INTERNAL] internal error (see the server's log)"
    assert broken.sent == [(line, 1)][fails - 1 :]
    wait_until(lambda: len(counted) == 2)
    assert {series.label_value for series in counted} == {"failed", "success"}


def test_a_request_goes_to_the_service_when_its_images_have_come(server_model, answering):
    sender = Sender()
    answer = accepted(server_model, answering, sender, None, images=("a",))
    assert answer.request.images == ()  # which are large, and with those who load them
    answering._make_ready(answer, ("patches",))
    wait_until(lambda: answer.handle == 9)
    # The tokens come from the thread that has loaded the images: the answering thread carries all other answers.
    assert answering.submitted == [([3, threading.get_ident()], ("patches",))] and answering.released == []
    answering._events.put((answer, canvas("stop")))
    wait_until(lambda: answering.released == [answer])
    assert [flags for _, flags in sender.sent] == [0, 1]


def test_images_that_come_after_the_end_are_not_held(server_model, answering):
    """They may be handed in while their request ends."""
    sender = Sender()
    answer = accepted(server_model, answering, sender, handle=5)
    answering._events.put((answer, canvas("stop")))
    wait_until(lambda: answering.released == [answer])
    answering._make_ready(answer, ("late",))
    wait_until(lambda: answering.released == [answer, answer])
    assert answering.submitted == [] and len(sender.sent) == 2


def test_a_long_text_holds_up_nobody_and_can_be_given_up(server_model, answering, monkeypatch):
    """Its tokens are found beside Triton's thread, which takes the next request meanwhile."""
    release, senders = threading.Event(), {}
    monkeypatch.setattr(answering._service, "tokens", lambda prompt: release.wait(60) and [1])
    monkeypatch.setattr(server_model, "parse_request", lambda request, *_: request)
    with ThreadPoolExecutor() as answering._texts:
        for prompt in ("a" * 20_000, "a", "b" * 20_000):
            senders[prompt[0], len(prompt)] = sender = Sender()
            request = GenerationRequest(request_id="7", prompt=prompt, stream=True, sampling=SamplingConfig())
            answering._accept(request, sender)
        assert answering.submitted == [("a", ())]
        given_up = senders["a", 20_000]
        given_up.cancelled = True
        wait_until(lambda: given_up.sent)
        release.set()
    wait_until(lambda: len(answering.submitted) == 2)
    assert answering.submitted[1] == ([1], ())
    assert not senders["b", 20_000].sent


def test_what_is_made_ready_has_a_place_in_the_queue_from_its_arrival(server_model, answering, monkeypatch):
    """Until it is submitted or ends; what finds none is refused at once."""
    release, senders = threading.Event(), [Sender() for _ in range(4)]
    monkeypatch.setattr(answering._service, "tokens", lambda prompt: release.wait(60) and [1])
    monkeypatch.setattr(server_model, "parse_request", lambda request, *_: request.parsed)
    long = GenerationRequest(request_id="7", prompt="a" * 20_000, stream=True, sampling=SamplingConfig())
    before_s = time.monotonic()
    with ThreadPoolExecutor() as answering._texts:

        def execute(sender: Sender) -> None:
            asked = {"parsed": long, "request_id": lambda: "7", "get_response_sender": lambda: sender}
            answering.execute([SimpleNamespace(**asked)])

        for sender in senders[:3]:
            execute(sender)
        assert [len(sender.sent) for sender in senders] == [0, 0, 1, 0]
        line = "[request id: 7] [UNAVAILABLE] queue: got 2 waiting requests, at most 2; try again later"
        assert senders[2].sent == [(line, 1)]
        assert all(before_s <= arrived_at_s <= time.monotonic() for arrived_at_s in answering.announced.values())
        senders[0].cancelled = True
        wait_until(lambda: len(answering.announced) == 1)
        execute(senders[3])
        assert not senders[3].sent
        release.set()
    wait_until(lambda: len(answering.submitted) == 2)
    assert not answering.announced


def test_what_is_made_ready_for_too_long_ends(server_model, answering):
    """What comes of it later is dropped. One that Triton's thread is just submitting is not looked at."""
    slow, other = Sender(), Sender()
    answer = accepted(server_model, answering, slow, None, images=("a",))
    being_submitted = accepted(server_model, answering, other, None)
    answering.overdue += [answer, being_submitted]
    wait_until(lambda: answer.finished)
    line = "[request id: 7] [DEADLINE_EXCEEDED] queue: waited 61 s, at most 60 s; try again later"
    assert slow.sent == [(line, 1)]
    wait_until(lambda: answer in answering.released)
    answering._events.put((answer, server_model._Ready([1], ())))
    being_submitted.handle = 8
    answering._events.put((being_submitted, canvas("stop")))
    wait_until(lambda: being_submitted.finished)
    assert not answering.submitted and [flags for _, flags in other.sent] == [0, 1]


@pytest.mark.parametrize(
    ("groups", "number"),
    [
        ({}, 1),
        ({"instance_group": [{"count": 3, "gpus": []}]}, 3),
        ({"instance_group": [{"count": 2, "gpus": [0, 1]}, {"gpus": [4]}]}, 5),
    ],
)
def test_instances_are_counted(server_model, groups, number):
    assert server_model.num_instances(groups) == number


@pytest.mark.parametrize(
    ("seen", "device", "expected"),
    [(None, "1", "1"), ("", "1", "1"), ("4,5", "1", "5"), ("GPU-a, MIG-b", "1", "MIG-b")],
    ids=["all", "nothing said", "numbers", "names"],
)
def test_a_worker_has_the_gpu_that_triton_means(seen, device, expected, server_model, monkeypatch):
    """Triton counts those that the server sees."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    args = {"model_instance_kind": "GPU", "model_instance_device_id": device}
    assert server_model.worker_environment(args) == {"CUDA_VISIBLE_DEVICES": expected}
    assert server_model.worker_environment(args | {"model_instance_kind": "CPU"}) == {}


def test_images_that_the_service_refuses_end_their_request(server_model, answering):
    sender = Sender()
    answer = accepted(server_model, answering, sender, None, images=("a",))
    answering._make_ready(answer, ("bad",))
    wait_until(lambda: answering.released == [answer])
    assert sender.sent == [("[request id: 7] [INVALID_ARGUMENT] prompt: got no place for an image", 1)]
    assert answering.cancelled == []


def test_a_prompt_with_images_that_is_no_text_ends_its_request(server_model, answering):
    sender = Sender()
    answer = accepted(server_model, answering, sender, None, images=("a",), prompt="half")
    answering._make_ready(answer, ("patches",))
    wait_until(lambda: answering.released == [answer])
    assert sender.sent == [("[request id: 7] [INVALID_ARGUMENT] prompt: got half of a surrogate pair", 1)]
    assert answering.submitted == []


def test_a_request_that_goes_while_its_images_load_never_reaches_the_service(server_model, answering):
    sender = Sender()
    answer = accepted(server_model, answering, sender, None, images=("a",))
    sender.cancelled = True
    wait_until(lambda: answering.released == [answer])
    answering._make_ready(answer, ("patches",))
    other = accepted(server_model, answering, Sender(), 6)
    answering._events.put((other, canvas("stop")))
    wait_until(lambda: other.finished)
    assert answering.submitted == answering.cancelled == []
    assert len(sender.sent) == 1
