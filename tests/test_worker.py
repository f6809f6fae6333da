"""The engine worker's loop around a scheduler that fails, and workers that do not start."""

import itertools
import sys
from types import SimpleNamespace

import pytest
from waiting import wait_until

from backend.errors import RequestError
from backend.job import CanvasOutput
from backend.metrics import MetricValues, Series
from backend.service import Service
from backend.service_limits import ServiceLimits
from backend.worker import Loop
from backend.worker_messages import Failure, Report, Submit
from backend.worker_process import WorkerConfig, WorkerError, WorkerProcess


class FakeScheduler:
    """One request at most; `steps` says what each tick does with it: an output, an exception, or "fails" of a device step."""

    def __init__(self, steps: list):
        self.metrics = MetricValues()
        self.num_failed_steps = 0
        self.is_idle = False
        self._steps = iter(steps)
        self._on_output = None

    def check(self, prompt_ids: list[int], sampling: object, *, images: tuple) -> None:
        if not prompt_ids:
            raise RequestError("INVALID_ARGUMENT", "prompt: got no tokens")

    def add(self, prompt_ids: list[int], sampling: object, on_output, **choices):
        self._on_output = on_output
        return SimpleNamespace(slot=0)

    def fail_all(self, error: RequestError) -> None:
        self._on_output(error)

    def tick(self) -> None:
        step = next(self._steps)
        self.num_failed_steps = self.num_failed_steps + 1 if step == "fails" else 0
        if isinstance(step, CanvasOutput):
            self._on_output(step)
        elif isinstance(step, BaseException):
            raise step


class Reports(list):
    """What a loop sent, and what ended it."""

    send = list.append
    ending: BaseException


def run(steps: list, prompt_ids: list[int]) -> Reports:
    """A loop over `steps`, ended by an interrupt if not before."""
    scheduler = FakeScheduler([*steps, KeyboardInterrupt()])
    scheduler.metrics.count("requests_total", label_value="success")
    asked = {"handle": 7, "prompt_ids": prompt_ids, "images": (), "sampling": None, "stop_scope": None}
    messages = [Submit(**asked, draft_interval_s=None, queued_at_s=0.0)]

    def take(timeout_s: float) -> Submit | None:
        return messages.pop() if messages else None

    reports = Reports()
    with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        Loop(SimpleNamespace(scheduler=scheduler), SimpleNamespace(take=take), reports).run()
    reports.ending = ended.value
    return reports


def canvas(finish_reason: str | None = None) -> CanvasOutput:
    return CanvasOutput(text="a", token_ids=[1], canvas_index=0, num_steps=1, finish_reason=finish_reason, num_prompt_tokens=1)


def outputs(reports: list[Report]) -> list:
    return [output for report in reports for output in report.outputs]


def test_outputs_are_reported_with_the_requests_handle():
    reports = run([canvas(), canvas("stop")], [1])
    assert outputs(reports) == [(7, canvas()), (7, canvas("stop"))]
    assert [report.started for report in reports if report.started] == [(7,)]


def test_requests_that_take_long_to_be_taken_leave_others_their_steps(monkeypatch):
    """A turn takes no more of them once the first has taken its time, and reports."""
    asked = {
        "prompt_ids": [1],
        "images": (),
        "sampling": None,
        "stop_scope": None,
        "draft_interval_s": None,
        "queued_at_s": 0.0,
    }
    messages, ticks = [Submit(handle=handle, **asked) for handle in range(3)], []
    scheduler = FakeScheduler([])
    clock = itertools.count(0, 10)
    monkeypatch.setattr("backend.worker.time.monotonic", lambda: next(clock))

    def tick() -> None:
        ticks.append(len(messages))
        if not messages:
            raise KeyboardInterrupt

    scheduler.tick = tick
    inbox = SimpleNamespace(take=lambda timeout_s: messages.pop(0) if messages else None)
    with pytest.raises(KeyboardInterrupt):
        Loop(SimpleNamespace(scheduler=scheduler), inbox, Reports()).run()
    assert ticks == [2, 1, 0]


def test_a_prompt_that_cannot_be_served_fails_alone():
    assert outputs(run([None], [])) == [(7, Failure(code="INVALID_ARGUMENT", message="prompt: got no tokens"))]


def test_an_unexpected_error_with_one_request_fails_it_alone(monkeypatch):
    def broken(*arguments, **choices):
        raise ValueError("secret\npath")

    monkeypatch.setattr(FakeScheduler, "add", broken)
    assert outputs(run([None], [1])) == [(7, Failure(code="INTERNAL", message="internal error; see the server's log"))]


def test_an_unexpected_error_fails_what_there_is_and_the_loop_goes_on():
    reports = run([ValueError("secret\npath"), None], [1])
    assert outputs(reports) == [(7, Failure(code="INTERNAL", message="internal error; see the server's log"))]


def test_a_device_that_does_not_recover_ends_the_process():
    reports = run(["fails", None, "fails", "fails", canvas()], [1])
    assert "3 device steps failed" in str(reports.ending)
    assert outputs(reports) == []


def test_a_device_that_recovers_does_not():
    reports = run(["fails", "fails", canvas(), "fails", "fails", canvas("stop")], [1])
    assert isinstance(reports.ending, KeyboardInterrupt)
    assert outputs(reports)[-1] == (7, canvas("stop"))


def test_a_cancelled_request_says_nothing_of_the_device():
    reports = run(["fails", "fails", canvas("cancelled"), "fails"], [1])
    assert "3 device steps failed" in str(reports.ending)


def test_requests_are_counted_by_the_parent_alone(monkeypatch):
    monkeypatch.setattr("backend.worker.BEAT_INTERVAL_S", 0)
    measured = [report.metrics for report in run([None], [1])]
    assert measured and all(Series("requests_total", "success") not in delta.counters for delta in measured)


def test_a_program_that_is_not_there(engine_dir, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(WorkerError, match=r"engine worker: cannot be started \(.*No such file or directory: '/nowhere/python'"):
        WorkerProcess(WorkerConfig(engine_dir=engine_dir))


@pytest.mark.parametrize(
    ("environment", "limits", "words"),
    [
        ({"PYTHONHOME": "/nowhere"}, {}, "engine worker: ended with exit code 1; see the server's log"),
        ({}, {"load_timeout_s": 0.0}, "engine worker: did not finish loading the engine within 0 s and was ended"),
    ],
)
def test_a_worker_that_does_not_get_ready(engine_dir, environment, limits, words):
    with pytest.raises(WorkerError) as caught:
        Service(WorkerConfig(engine_dir=engine_dir, environment=environment), ServiceLimits(**limits))
    assert str(caught.value) == words


class Unreadable:
    """A message that takes more memory to read than there is."""

    def __reduce__(self):
        return bytearray, (1 << 60,)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (Unreadable(), "engine worker: ended with exit code 1; see the server's log"),
        (lambda: "what cannot be pickled", "engine worker: ended by SIGKILL; see the server's log"),
    ],
    ids=["read", "written"],
)
def test_a_message_that_cannot_be_passed_on_ends_the_worker(engine_dir, message, words):
    """It would be deaf from then on, and alive to all appearances."""
    worker = WorkerProcess(WorkerConfig(engine_dir=engine_dir))
    try:
        worker.send(message)
        with pytest.raises(WorkerError) as caught:
            wait_until(lambda: worker.receive(0.1) is message)
    finally:
        worker.end()
    assert str(caught.value) == words
