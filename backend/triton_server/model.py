"""The server class: what Triton Inference Server calls when the model is loaded, asked and unloaded.

    Triton's thread      execute: parse, submit, return        ─┐
    scheduler's thread   on_output of every request            ─┼─▶ one queue ─▶ the answering thread: every response
    client               cancel, disconnect, time-out (polled) ─┘

All responses of accepted requests leave from one thread, so that an answer needs no lock, keeps its order and ends once, and
so that neither Triton nor the scheduler waits for a client. Imports only inside the Python backend of a Triton server.
"""

import json
import math
import queue
import threading
import time
import traceback
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import triton_python_backend_utils as pb_utils

from backend.errors import RequestError
from backend.scheduler import CanvasOutput
from backend.service import Service
from backend.triton_server.request import parse_request
from backend.triton_server.response import Answer, send_error

_POLL_INTERVAL_S = 0.05  # is_cancelled() takes 35 us: 300 requests cost a fifth of one core
_CLOSE_TIMEOUT_S = 5.0
_ACCEPTED, _CLOSED = object(), object()


class DiffusionGemmaModel:
    """One loaded model: a `Service` on an engine directory, and the answers that are under way."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the engine. What it raises is the reason that Triton gives for a model that does not load."""
        parameters = ModelParameters.from_config(json.loads(args["model_config"]), Path(args["model_repository"]))
        self._service = Service(
            parameters.engine_dir,
            max_sequences=parameters.max_sequences,
            max_queued=parameters.max_queued,
            queue_timeout_s=parameters.queue_timeout_s,
        )
        self._closing = False
        self._events: queue.SimpleQueue[tuple[Answer | None, object]] = queue.SimpleQueue()
        self._answering = threading.Thread(target=self._answer_until_closed, name="answering")
        self._answering.start()

    def execute(self, requests: list) -> None:
        """Hands every request over and returns; a request that is refused gets its error at once."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except RequestError as error:
                send_error(sender, request.request_id(), error)
            except Exception:  # Triton would send the client the message of what escapes, file paths included
                send_error(sender, request.request_id(), _logged_internal_error())

    def finalize(self) -> None:
        """Refuses what still comes, ends what is under way, and waits until every answer is out."""
        self._closing = True
        self._service.close(_CLOSE_TIMEOUT_S)
        self._events.put((None, _CLOSED))
        self._answering.join()

    def _accept(self, request, sender) -> None:
        """Raises for a request that is refused before it has an `Answer`; later errors go through the answering thread."""
        if self._closing:
            raise RequestError("UNAVAILABLE", "server: it is shutting down; send the request again later")
        parsed = parse_request(request)
        answer = Answer(sender, parsed)
        self._events.put((answer, _ACCEPTED))
        try:
            on_output = partial(self._on_output, answer)
            answer.handle = self._service.submit(parsed.prompt, parsed.sampling, on_output)
        except RequestError as error:
            self._events.put((answer, error))
        except Exception:  # as in execute
            self._events.put((answer, _logged_internal_error()))

    def _on_output(self, answer: Answer, output: CanvasOutput | RequestError) -> None:
        self._events.put((answer, output))

    def _answer_until_closed(self) -> None:
        active: set[Answer] = set()
        poll_at_s = time.monotonic()
        while True:
            try:
                answer, event = self._events.get(timeout=max(0.0, poll_at_s - time.monotonic()))
            except queue.Empty:
                event = None
            if event is _CLOSED:
                break
            if event is _ACCEPTED:
                active.add(answer)
            elif event is not None:
                self._advance(answer, event)
            if time.monotonic() >= poll_at_s:
                for answer in active:
                    self._advance(answer, None)
                poll_at_s = time.monotonic() + _POLL_INTERVAL_S
            active = {answer for answer in active if not answer.finished}
        for answer in active:
            self._advance(
                answer, RequestError("UNAVAILABLE", "server: it shut down before the answer was complete; send it again")
            )

    def _advance(self, answer: Answer, event: CanvasOutput | RequestError | None) -> None:
        """Gives one answer what has come for it, or ends it if its client has gone. A failure here ends this answer alone."""
        if answer.finished:
            return
        try:
            abandoned = answer.abandoned()
            if abandoned and answer.handle is not None:
                self._service.cancel(answer.handle)
                answer.fail(abandoned)
            elif isinstance(event, RequestError):
                answer.fail(event)
            elif event is not None:
                answer.add(event)
        except Exception:  # the thread must live: it carries every other answer
            answer.fail(_logged_internal_error())


@dataclass(frozen=True, kw_only=True)
class ModelParameters:
    """The `parameters` of config.pbtxt."""

    engine_dir: Path
    max_sequences: int = 16
    max_queued: int = 256
    queue_timeout_s: float = 60.0

    @classmethod
    def from_config(cls, model_config: dict, model_dir: Path) -> "ModelParameters":
        """Reads the server's JSON form of config.pbtxt. Raises ValueError with one line.

        A relative engine_dir starts at `model_dir`. Names in capitals are the Python backend's own.
        """
        given = {
            name: value["string_value"] for name, value in model_config.get("parameters", {}).items() if not name.isupper()
        }
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"config.pbtxt: got the unknown parameters {unknown}, expected some of {known}; remove them")
        if "engine_dir" not in given:
            raise ValueError("config.pbtxt: got no parameter engine_dir, expected the path of an engine directory; add it")
        values = {
            name: _number(name, text, int if name != "queue_timeout_s" else float)
            for name, text in given.items()
            if name != "engine_dir"
        }
        return cls(engine_dir=(model_dir / given["engine_dir"]).resolve(), **values)


def _number(name: str, text: str, kind: type) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    minimum = 1 if name == "max_sequences" else 0
    if not minimum <= value < math.inf:
        wanted = "a whole number" if kind is int else "a number of seconds"
        raise ValueError(f"config.pbtxt, parameter {name}: got {text!r}, expected {wanted} of at least {minimum}")
    return value


def _logged_internal_error() -> RequestError:
    """What a client is told of the exception being handled; the log gets all of it."""
    pb_utils.Logger.log_error(traceback.format_exc())
    return RequestError("INTERNAL", "internal error (see the server's log)")
