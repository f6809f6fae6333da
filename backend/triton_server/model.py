"""The server class: what Triton Inference Server calls when the model is loaded, asked and unloaded.

    Triton's thread      execute: parse, submit, return        ─┐
    threads beside it    a request's images, long text's tokens ┤
    supervising thread   on_output of every request            ─┼─▶ one queue ─▶ the answering thread: every response
    client               cancel, disconnect, time-out (polled) ─┘

All responses of accepted requests leave from one thread, so that an answer needs no lock, keeps its order and ends once, and
so that neither Triton nor the engine waits for a client. Imports only inside the Python backend of a Triton server.
"""

import json
import os
import queue
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import triton_python_backend_utils as pb_utils

from backend.chat.template import ChatTemplate, rendering
from backend.errors import RequestError, refused
from backend.grammar_check import check_grammar
from backend.images.loading import ImageLoader
from backend.images.pool import ImagePool
from backend.images.preprocess import ImagePatches
from backend.job import CanvasOutput, DraftOutput
from backend.metrics import MetricValues, Outcome
from backend.service import Service
from backend.text_stream import EVERYWHERE
from backend.triton_server.exported_metrics import ExportedMetrics
from backend.triton_server.request import parse_request
from backend.triton_server.response import Answer, send_error
from backend.triton_server.settings import Settings
from backend.worker_process import WorkerError

_POLL_INTERVAL_S = 0.05  # is_cancelled() takes 35 us: 300 requests cost a fifth of one core
_EXPORT_INTERVAL_S = 0.2
_TEXT_THREADS = 2
_SHORT_TEXT = 16384  # characters; their tokens take 10 ms, not much more than a way through other threads
_ACCEPTED, _WORKER_DIED, _CLOSED = object(), object(), object()


class _Ready(NamedTuple):
    """What a request is handed over with that was made ready beside Triton's thread."""

    prompt_ids: list[int]
    images: tuple[ImagePatches, ...]


class DiffusionGemmaModel:
    """One instance of the loaded model: a `Service` on an engine directory, and the answers that are under way."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the engine. What it raises is the reason that Triton gives for a model that does not load, and gives to the
        client that asked for it, with the places of the traceback: raised here anew, so that there is one."""
        try:
            self._load(args)
        except (ValueError, WorkerError) as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def execute(self, requests: list) -> None:
        """Hands every request over and returns; a request that is refused gets its error at once."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except RequestError as error:
                self._metrics.count("requests_total", label_value="rejected")
                send_error(sender, request.request_id(), error)
            except Exception:  # Triton would send the client the message of what escapes, file paths included
                self._metrics.count("requests_total", label_value="failed")
                send_error(sender, request.request_id(), _logged_internal_error())

    def finalize(self) -> None:
        """Refuses what still comes, ends what is under way, and waits until every answer is out and the worker has ended."""
        self._closing = True
        self._images.close()
        self._texts.shutdown(wait=False, cancel_futures=True)
        self._service.close(self._settings.close_timeout_s)
        self._events.put((None, _CLOSED))
        self._answering.join()

    def _load(self, args: dict[str, str]) -> None:
        self._name = args["model_name"]
        model_config = json.loads(args["model_config"])
        self._settings = Settings.from_model_config(model_config)
        self._closing = False
        self._events: queue.SimpleQueue[tuple[Answer | None, object]] = queue.SimpleQueue()
        self._metrics = MetricValues()
        worker = self._settings.worker_config(Path(args["model_repository"]), worker_environment(args))
        with ThreadPoolExecutor(1) as beside:
            beside.submit(rendering)  # for the template, while the worker loads the engine
            self._service = Service(
                worker,
                self._settings.service_limits(),
                on_metrics=lambda delta: self._events.put((None, delta)),
                on_death=lambda: self._events.put((None, _WORKER_DIED)),
                on_restart=lambda: self._metrics.count("worker_restarts_total"),
                on_gave_up=self._unload,
            )
        self._images = ImagePool(
            ImageLoader(
                limits=self._settings.image_limits(),
                vision=self._service.model.vision,
                max_soft_tokens=self._settings.image_soft_tokens or None,
            ),
            max_bytes=self._settings.image_memory_bytes,
            num_threads=self._settings.image_threads,
        )
        self._texts = ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="texts")
        self._max_requests = self._service.max_requests * num_instances(model_config)
        self._template = ChatTemplate.load(worker.engine_dir, self._service.tokenizer)
        self._exported = ExportedMetrics({"model": self._name, "instance": args["model_instance_name"]})
        self._answering = threading.Thread(target=self._answer_until_closed, name="answering")
        self._answering.start()

    def _unload(self, reason: str) -> None:
        """Makes readiness tell the truth: this instance has no worker any more and gets none."""
        pb_utils.Logger.log_error(f"model {self._name}: {reason}; unloading the model")
        try:
            pb_utils.unload_model(self._name)  # returns at once
        except pb_utils.TritonModelException as error:
            pb_utils.Logger.log_error(f"model {self._name}: every request is refused, because it cannot be unloaded: {error}")

    def _accept(self, request, sender) -> None:
        """Raises for a request that is refused before it has its place; later errors go through the answering thread."""
        arrived_at_s = time.monotonic()
        if self._closing:
            raise RequestError("UNAVAILABLE", "server: it is shutting down; send the request again later")
        parsed = parse_request(request, self._template, self._settings.default_max_tokens)
        if parsed.num_choices > self._max_requests:
            got, most = f"{parsed.num_choices} choices in all", f"{self._max_requests}, the places in batch and queue"
            raise refused(f"n: got {got}, expected at most {most}; ask for fewer at once, or raise max_queued")
        takes_long = (isinstance(parsed.prompt, str) and len(parsed.prompt) > _SHORT_TEXT) or parsed.sampling.structured_outputs
        answer = Answer(sender, parsed, self._service.tokenizer, is_made_ready=bool(parsed.images or takes_long))
        self._service.announce(answer, arrived_at_s)
        self._events.put((answer, _ACCEPTED))
        try:
            if parsed.images:
                self._images.submit(answer, parsed.images, partial(self._make_ready, answer))
            elif takes_long:
                self._texts.submit(self._make_ready, answer, ())
            else:
                self._submit(answer, parsed.prompt)
        except RequestError as error:
            self._events.put((answer, error))
        except Exception:  # as in execute
            self._events.put((answer, _logged_internal_error()))

    def _make_ready(self, answer: Answer, loaded: tuple[ImagePatches, ...] | RequestError) -> None:
        """On another thread than Triton's, because the tokens of megabytes of text take seconds, and so may a grammar."""
        event: _Ready | RequestError | None = None
        try:
            if isinstance(loaded, RequestError):
                event = loaded
            elif not answer.finished:
                check_grammar(answer.request.sampling.structured_outputs)
                event = _Ready(self._service.tokens(answer.request.prompt), loaded)
        except RequestError as error:
            event = error
        except Exception:  # as in execute
            event = _logged_internal_error()
        self._events.put((answer, event))

    def _submit(self, answer: Answer, prompt: str | list[int], images: tuple[ImagePatches, ...] = ()) -> None:
        request = answer.request
        answer.handle = self._service.submit(
            prompt,
            request.sampling,
            partial(self._on_output, answer),
            images=images,
            stop_scope=request.answer.stop_scope if request.answer else EVERYWHERE,
            draft_interval_s=self._settings.draft_interval_s if request.drafts else None,
            owner=answer,
        )

    def _on_output(self, answer: Answer, output: CanvasOutput | DraftOutput | RequestError) -> None:
        self._events.put((answer, output))

    def _answer_until_closed(self) -> None:
        active: set[Answer] = set()
        poll_at_s = export_at_s = time.monotonic()
        while True:
            try:
                answer, event = self._events.get(timeout=max(0.0, poll_at_s - time.monotonic()))
            except queue.Empty:
                answer = event = None
            if event is _CLOSED:
                break
            if event is _ACCEPTED:
                active.add(answer)
            elif answer is not None:
                self._advance(answer, event)
            elif event is _WORKER_DIED:
                self._exported.clear_gauges()
            elif event is not None:
                self._exported.apply(event)
            now_s = time.monotonic()
            if now_s >= poll_at_s:
                for answer in active:
                    self._advance(answer, None)
                poll_at_s = now_s + _POLL_INTERVAL_S
            if now_s >= export_at_s:
                self._exported.apply(self._metrics.drain())
                export_at_s = now_s + _EXPORT_INTERVAL_S
            for answer in [answer for answer in active if answer.finished]:
                active.remove(answer)
                self._service.withdraw(answer)
                self._images.release(answer)
        for answer in active:
            line = "server: it shut down before the answer was complete; send it again"
            self._advance(answer, RequestError("UNAVAILABLE", line))
        self._exported.apply(self._metrics.drain())
        self._exported.clear_gauges()

    def _advance(self, answer: Answer, event: _Ready | CanvasOutput | DraftOutput | RequestError | None) -> None:
        """Gives one answer what has come for it, or ends it if its client has gone. A failure here ends this answer alone."""
        if answer.finished:
            self._images.release(answer)  # they may have been handed in after it had ended
            return
        try:
            if isinstance(event, _Ready):
                event = self._submitted(answer, event)
            elif event is None and answer.handle is None and answer.is_cancellable:  # its images or its text are being read
                event = self._service.overdue(answer)
            abandoned = answer.abandoned()
            if abandoned and answer.is_cancellable:
                if answer.handle is not None:
                    self._service.cancel(answer.handle)
                outcome = "cancelled" if abandoned.code == "CANCELLED" else "failed"
                answer.fail(abandoned)
            elif isinstance(event, RequestError):
                outcome = _outcome(event, was_accepted=answer.handle is not None)
                answer.fail(event)
            elif event is not None:
                outcome = "success"
                answer.add(event)
        except Exception:  # the thread must live: it carries every other answer
            outcome = "failed"
            self._abort(answer)
        if answer.finished:
            self._metrics.count("requests_total", label_value=outcome)

    def _submitted(self, answer: Answer, ready: _Ready) -> RequestError | None:
        """Hands a request over that was made ready; returns the error if it is refused."""
        try:
            self._submit(answer, *ready)
        except RequestError as error:
            return error
        return None

    def _abort(self, answer: Answer) -> None:
        """Ends an answer whose responses cannot be made or sent; the error may be refused as they were."""
        error = _logged_internal_error()
        if answer.handle is not None:
            self._service.cancel(answer.handle)
        try:
            answer.fail(error)
        except Exception:
            _logged_internal_error()


def _outcome(error: RequestError, *, was_accepted: bool) -> Outcome:
    """How the service ended a request. A time-out of its own is one of the queue; it is unavailable before a request was
    accepted, because it is full, and after that, because no worker is left."""
    if error.code == "UNAVAILABLE":
        return "failed" if was_accepted else "rejected"
    return "rejected" if error.code in ("INVALID_ARGUMENT", "DEADLINE_EXCEEDED") else "failed"


def num_instances(model_config: Mapping[str, Any]) -> int:
    """Of the model, this one among them. model_config: as the server passes it on."""
    groups = model_config.get("instance_group", ())
    return max(1, sum(group.get("count", 1) * max(1, len(group.get("gpus", ()))) for group in groups))


def worker_environment(args: dict[str, str]) -> dict[str, str]:
    """What an instance's worker finds in its environment: an instance on a GPU has that GPU alone, as its first.

    Triton counts the GPUs that the server sees, which its own environment may have chosen, by number or by name.
    """
    if args["model_instance_kind"] != "GPU":
        return {}
    device, seen = args["model_instance_device_id"], os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": seen.split(",")[int(device)].strip() if seen else device}


def _logged_internal_error() -> RequestError:
    """What a client is told of the exception being handled; the log gets all of it."""
    pb_utils.Logger.log_error(traceback.format_exc())
    return RequestError("INTERNAL", "internal error (see the server's log)")
