"""An engine worker for many threads: requests in, outputs out, and a new worker when one dies.

    any thread                 submit, cancel ──────▶ worker's outbox ──▶ engine worker
    supervising thread         on_output of every request ◀── reports ◀──┘
                               starts the worker, watches it, starts it again

What the worker had when it died ends with an error; what had not been sent to it waits for the next one.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from tokenizers import Tokenizer

from backend.errors import RequestError
from backend.images.placeholders import expand
from backend.images.preprocess import ImagePatches
from backend.job import OnOutput
from backend.metrics import MetricsDelta, Series
from backend.prompt_tokens import PromptTokenizer, check_positions
from backend.sampling_config import SamplingConfig
from backend.service_limits import ServiceLimits
from backend.service_request import ServiceRequest
from backend.text_stream import EVERYWHERE, StopScope
from backend.worker_messages import Cancel, Failure, LoadFailed, Ready, Report, Submit, is_last
from backend.worker_process import WorkerConfig, WorkerError, WorkerProcess
from contract.model_config import ModelConfig

_logger = logging.getLogger(__name__)
_WATCH_INTERVAL_S = 0.1


class Service:
    """Owns the worker. Every method may be called from any thread.

    A request ends with exactly one last output: one with a finish_reason, or a RequestError.
    """

    def __init__(
        self,
        config: WorkerConfig,
        limits: ServiceLimits,
        *,
        on_metrics: Callable[[MetricsDelta], None] = lambda delta: None,
        on_death: Callable[[], None] = lambda: None,
        on_restart: Callable[[], None] = lambda: None,
        on_gave_up: Callable[[str], None] = lambda reason: None,
    ):
        """Starts the worker and waits until it has loaded the engine.

        Called from the supervising thread: on_metrics with what the worker has measured, on_death when it has died, on_restart
        when another one is started in its place, on_gave_up with the reason when none is.

        Raises:
            WorkerError: the engine cannot be used, or the worker died or hung while loading it.
        """
        self._config, self._limits = config, limits
        self._on_metrics, self._on_death, self._on_restart, self._on_gave_up = on_metrics, on_death, on_restart, on_gave_up
        self._handles = itertools.count(1)
        self._lock = threading.Lock()
        self._requests: dict[int, ServiceRequest] = {}
        self._announced: dict[Hashable, float] = {}  # when they arrived
        self._worker: WorkerProcess | None = None  # the one that is ready
        self._unusable: str | None = None  # why every request is refused
        self._deadline_s = float("inf")  # of closing
        self._ready_at_s = float("inf")  # when the worker was
        self._num_queued: int | None = None  # as last told
        first_start: Future[Ready] = Future()
        self._thread = threading.Thread(target=self._supervise, args=(first_start,), name="supervisor", daemon=True)
        self._thread.start()
        with ThreadPoolExecutor(1) as beside:  # what is wrong with the engine, its worker says better
            tokenizer = beside.submit(Tokenizer.from_file, str(config.engine_dir / "tokenizer.json"))
            self._engine = first_start.result()
        self.tokenizer = tokenizer.result()
        self.max_requests = self._engine.max_sequences + limits.max_queued  # places in the batch and in the queue
        max_tokens = self._engine.model.max_position_embeddings
        self._tokenize = PromptTokenizer(self.tokenizer, self._engine.bos_token, max_tokens)

    @property
    def model(self) -> ModelConfig:
        """The model of the engine."""
        return self._engine.model

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker; None while there is none that is ready."""
        with self._lock:
            return self._worker.pid if self._worker else None

    def tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt as `submit` takes it. Raises RequestError INVALID_ARGUMENT, see `PromptTokenizer`."""
        return self._tokenize(prompt) if isinstance(prompt, str) else list(prompt)

    def announce(self, owner: Hashable, arrived_at_s: float) -> None:
        """Gives a request its place in the queue before it is ready to be submitted, until it is, or is withdrawn.
        arrived_at_s: by `time.monotonic`; what is measured of the request begins there.

        Raises:
            RequestError: UNAVAILABLE as `submit`.
        """
        with self._lock:
            self._check_room()
            self._announced[owner] = arrived_at_s

    def overdue(self, owner: Hashable) -> RequestError | None:
        """DEADLINE_EXCEEDED for a request that was announced too long ago and is not submitted yet, which may be withdrawn."""
        with self._lock:
            arrived_at_s = self._announced.get(owner)
        return None if arrived_at_s is None else self._limits.overdue(time.monotonic() - arrived_at_s)

    def withdraw(self, owner: Hashable) -> None:
        """It will not be submitted; nothing happens if it has been."""
        with self._lock:
            self._announced.pop(owner, None)

    def submit(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingConfig,
        on_output: OnOutput,
        *,
        images: Sequence[ImagePatches] = (),
        stop_scope: StopScope = EVERYWHERE,
        draft_interval_s: float | None = None,
        owner: Hashable = None,
    ) -> int:
        """Queues a request and returns its handle; `on_output` is called from the supervising thread and must not block.
        images: one for each placeholder of the prompt. stop_scope, draft_interval_s: see `Scheduler.add`. owner: of the place
        that it was given before; None for one without.

        Raises:
            RequestError: INVALID_ARGUMENT for parameters that contradict each other, for images that do not fit the prompt, and
                for a prompt longer than the model's positions, UNAVAILABLE over the queue's limit, while closing, or after too
                many deaths. What else can never be served is found by the worker.
        """
        token_ids = expand(self.tokens(prompt), images, self._engine.model)
        resolved = sampling.resolve(self._engine.defaults, self._tokenize.of_answer)
        check_positions(self._engine.model, token_ids, resolved)  # here, so that millions of tokens go nowhere
        with self._lock:
            if owner not in self._announced or self._unusable:
                self._check_room()
            arrived_at_s = self._announced.pop(owner, time.monotonic())
            handle = next(self._handles)
            request = ServiceRequest(
                prompt_ids=token_ids,
                images=tuple(images),
                sampling=resolved,
                on_output=on_output,
                stop_scope=stop_scope,
                draft_interval_s=draft_interval_s,
                queued_at_s=arrived_at_s,
            )
            self._requests[handle] = request
            if self._worker:
                self._send(handle, request)
        return handle

    def cancel(self, handle: int) -> None:
        """Ends a request within one step; nothing happens if it has ended. There is no output after this, but for one that is
        being handed over at this moment."""
        with self._lock:
            self._forget(handle)

    def close(self, timeout_s: float = 5.0) -> None:
        """Refuses new requests, gives the others `timeout_s` to finish, fails the rest and ends the worker."""
        with self._lock:
            self._unusable = "server is shutting down; send the request to another one"
            self._deadline_s = time.monotonic() + timeout_s
        self._thread.join()

    def _check_room(self) -> None:
        if self._unusable:
            raise RequestError("UNAVAILABLE", self._unusable)
        # Those that the worker has not started yet but has places for do not wait.
        waiting = len(self._requests) + len(self._announced) - self._engine.max_sequences
        if waiting >= self._limits.max_queued:
            line = f"queue: got {waiting} waiting requests, at most {self._limits.max_queued}; try again later"
            raise RequestError("UNAVAILABLE", line)

    def _send(self, handle: int, request: ServiceRequest) -> None:
        request.sent = True
        self._worker.send(
            Submit(
                handle=handle,
                prompt_ids=request.prompt_ids,
                images=request.images,
                sampling=request.sampling,
                stop_scope=request.stop_scope,
                draft_interval_s=request.draft_interval_s,
                queued_at_s=request.queued_at_s,
            )
        )
        request.images = ()

    def _forget(self, handle: int) -> ServiceRequest | None:
        request = self._requests.pop(handle, None)
        if request and request.sent and self._worker:
            self._worker.send(Cancel(handle=handle))
        return request

    def _supervise(self, first_start: Future[Ready]) -> None:
        """1. Start a worker and serve with it until it dies or the service has closed. 2. Fail what it had. 3. Once more,
        unless it never loaded or died too often."""
        num_deaths = 0
        while True:
            try:
                self._serve(first_start)  # 1.
                return
            except WorkerError as error:
                reason = str(error)
            except Exception as error:  # of ours, whatever it is: without this thread every request would wait for ever
                _logger.exception("supervising the engine worker failed")
                reason = f"server: internal error ({type(error).__name__}); see its log"
            self._fail(lambda request: request.sent, RequestError("ABORTED", f"{reason}; send the request again"))  # 2.
            if not first_start.done():
                first_start.set_exception(WorkerError(reason))
                return
            _logger.error("%s", reason)
            self._on_death()
            has_served = time.monotonic() - self._ready_at_s > self._limits.deaths_window_s  # 3.
            num_deaths = 1 if has_served else num_deaths + 1
            if num_deaths >= self._limits.max_deaths:
                break
            self._on_restart()
        why = f"{reason}; workers died {num_deaths} times in a row, and no other is started"
        with self._lock:
            self._unusable = self._unusable or f"{why}; load the model again"
        self._fail(lambda request: True, RequestError("UNAVAILABLE", self._unusable))
        self._on_gave_up(why)

    def _serve(self, first_start: Future[Ready]) -> None:
        """Returns when the service has closed. Raises WorkerError for a worker that died or hung; it has ended then."""
        self._ready_at_s, self._num_queued = float("inf"), None
        worker = WorkerProcess(self._config)
        try:
            silent_since_s, is_loaded = time.monotonic(), False
            while True:
                message = worker.receive(_WATCH_INTERVAL_S)
                now_s = time.monotonic()
                if isinstance(message, LoadFailed):
                    raise WorkerError(message.message)
                if isinstance(message, Ready):
                    is_loaded, self._ready_at_s = True, now_s
                    self._adopt(worker)
                    if not first_start.done():
                        first_start.set_result(message)
                elif message is not None:
                    self._deliver(message)
                if message is not None:
                    silent_since_s = now_s
                allowed_s = self._limits.progress_timeout_s if is_loaded else self._limits.load_timeout_s
                if now_s - silent_since_s > allowed_s:
                    doing = "made no progress" if is_loaded else "did not finish loading the engine"
                    raise WorkerError(f"engine worker: {doing} within {allowed_s:g} s and was ended")
                self._expire(now_s)
                self._measure_queue()
                if self._is_closed(now_s):
                    self._fail(lambda request: True, RequestError("UNAVAILABLE", self._unusable))
                    return
        finally:
            with self._lock:
                self._worker = None
            worker.end()

    def _adopt(self, worker: WorkerProcess) -> None:
        with self._lock:
            self._worker = worker
            for handle, request in self._requests.items():
                self._send(handle, request)

    def _deliver(self, report: Report) -> None:
        if report.metrics is not None:
            self._on_metrics(report.metrics)
        with self._lock:
            for handle in report.started:
                if handle in self._requests:
                    self._requests[handle].started = True
            called = []
            for handle, output in report.outputs:
                # What was cancelled may still have outputs under way.
                request = self._requests.pop(handle, None) if is_last(output) else self._requests.get(handle)
                if request is not None:
                    called.append((request, output))
        for request, output in called:
            request.call(RequestError(output.code, output.message) if isinstance(output, Failure) else output)

    def _expire(self, now_s: float) -> None:
        """Fails what has waited too long for a place in the batch."""
        with self._lock:
            waiting = [(handle, request.queued_at_s) for handle, request in self._requests.items() if not request.started]
            errors = {handle: self._limits.overdue(now_s - queued_at_s) for handle, queued_at_s in waiting}
            ended = [(self._forget(handle), error) for handle, error in errors.items() if error]
        for request, error in ended:
            request.call(error)

    def _measure_queue(self) -> None:
        """Only here all that waits is known, also while there is no worker."""
        with self._lock:
            num_queued = len(self._announced) + sum(not request.started for request in self._requests.values())
        if num_queued != self._num_queued:
            self._num_queued = num_queued
            self._on_metrics(MetricsDelta(gauges={Series("queued_requests"): num_queued}))

    def _is_closed(self, now_s: float) -> bool:
        with self._lock:
            return now_s >= self._deadline_s or (self._deadline_s < float("inf") and not self._requests)

    def _fail(self, concerned: Callable[[ServiceRequest], bool], error: RequestError) -> None:
        with self._lock:
            ended = [handle for handle, request in self._requests.items() if concerned(request)]
            requests = [self._requests.pop(handle) for handle in ended]
        for request in requests:
            request.call(error)
