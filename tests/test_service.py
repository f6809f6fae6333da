"""The service and its engine worker, a real child process, without a server: death, silence, limits, closing."""

import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from damaged_engines import damaged_engine
from waiting import wait_until

from backend.errors import RequestError
from backend.job import CanvasOutput
from backend.metrics import HistogramDelta, MetricsDelta, Series
from backend.sampling_config import SamplingConfig
from backend.service import Service
from backend.service_limits import ServiceLimits
from backend.worker_process import WorkerConfig, WorkerError

TIMEOUT_S = 60  # only a hanging service needs it
SHORT = SamplingConfig(max_tokens=1, seed=1)
ENDLESS = SamplingConfig(max_tokens=3000, ignore_eos=True, confidence_threshold=0)


class Asked:
    """A request's outputs as they come."""

    def __init__(self, service: Service, sampling: SamplingConfig):
        self._outputs: queue.Queue = queue.Queue()
        self.handle = service.submit("Count from 7 to 29.", sampling, self._outputs.put)

    def next(self) -> CanvasOutput | RequestError:
        return self._outputs.get(timeout=TIMEOUT_S)

    def last(self) -> CanvasOutput | RequestError:
        while True:
            output = self.next()
            if isinstance(output, RequestError) or output.finish_reason:
                return output

    @property
    def has_more(self) -> bool:
        return not self._outputs.empty()


class Watched:
    """A service, and what it said about its workers."""

    def __init__(self, engine_dir: Path, *, max_sequences: int = 4, **limits):
        self.deaths, self.restarts = 0, 0
        self.gave_up: queue.Queue[str] = queue.Queue()
        self.metrics: list[MetricsDelta] = []
        self.service = Service(
            WorkerConfig(engine_dir=engine_dir, limits={"max_sequences": max_sequences}),
            replace(ServiceLimits(), **limits),
            on_metrics=self.metrics.append,
            on_death=self._on_death,
            on_restart=self._on_restart,
            on_gave_up=self.gave_up.put,
        )

    def _on_death(self) -> None:
        self.deaths += 1

    def _on_restart(self) -> None:
        self.restarts += 1

    def gauge(self, name: str) -> float | None:
        """As it was told last."""
        told = [delta.gauges[Series(name)] for delta in list(self.metrics) if Series(name) in delta.gauges]
        return told[-1] if told else None

    def histogram(self, name: str) -> HistogramDelta | None:
        """All that it has been told so far: each request's numbers may come by themselves."""
        told = [delta.histograms[Series(name)] for delta in list(self.metrics) if Series(name) in delta.histograms]
        counts = tuple(map(sum, zip(*(each.counts for each in told), strict=True)))
        return HistogramDelta(counts=counts, sum=sum(each.sum for each in told)) if told else None

    def signal(self, number: int) -> None:
        os.kill(self.worker_pid(), number)

    def worker_pid(self) -> int:
        wait_until(lambda: self.service.worker_pid is not None)
        return self.service.worker_pid


@pytest.fixture(scope="module")
def watched(engine_dir) -> Iterator[Watched]:
    """May lose workers without end; a silent one is ended after ten seconds, which no busy machine takes for a step."""
    watched = Watched(engine_dir, max_deaths=1000, progress_timeout_s=10.0)
    yield watched
    watched.service.close()


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "ended by SIGKILL"), (signal.SIGSTOP, "made no progress within 10 s")]
)
def test_a_lost_worker_fails_what_it_had_and_is_replaced(watched, number, words):
    restarts = watched.restarts
    had = [Asked(watched.service, ENDLESS) for _ in range(3)]
    assert all(isinstance(asked.next(), CanvasOutput) for asked in had)
    watched.signal(number)
    errors = [asked.last() for asked in had]
    assert {error.code for error in errors} == {"ABORTED"}
    assert all(words in str(error) and "\n" not in str(error) for error in errors)
    assert Asked(watched.service, SHORT).last().finish_reason == "length"
    assert watched.restarts == restarts + 1
    assert not any(asked.has_more for asked in had)


def test_an_interrupt_from_the_terminal_is_the_parents(watched):
    """Who stops a server with Ctrl-C signals every process of the terminal; requests get their time to finish."""
    pid, asked = watched.worker_pid(), Asked(watched.service, ENDLESS)
    asked.next()
    watched.signal(signal.SIGINT)
    assert all(isinstance(asked.next(), CanvasOutput) for _ in range(3))
    assert Asked(watched.service, SHORT).last().finish_reason == "length"
    assert watched.worker_pid() == pid
    watched.service.cancel(asked.handle)


def test_a_request_sent_while_there_is_no_worker_waits_for_the_next(watched):
    pid = watched.worker_pid()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: watched.service.worker_pid != pid)
    assert watched.service.worker_pid is None
    assert Asked(watched.service, SHORT).last().finish_reason == "length"


def test_a_prompt_longer_than_the_positions_does_not_reach_the_worker(watched):
    for prompt in ("many " * 5000, [5] * 5000):
        with pytest.raises(RequestError, match=r"prompt: got \d+ tokens and max_tokens 1, .* at most 4096 in all"):
            watched.service.submit(prompt, SHORT, lambda output: None)


def test_a_worker_that_dies_too_often_is_not_replaced(engine_dir):
    watched = Watched(engine_dir, max_deaths=2, deaths_window_s=600)
    for _ in range(2):
        watched.signal(signal.SIGKILL)
        wait_until(lambda: watched.service.worker_pid is None)
    reason = watched.gave_up.get(timeout=TIMEOUT_S)
    assert "2 times in a row" in reason and "SIGKILL" in reason
    with pytest.raises(RequestError, match="load the model again") as caught:
        Asked(watched.service, SHORT)
    assert caught.value.code == "UNAVAILABLE"
    assert (watched.deaths, watched.restarts) == (2, 1)
    watched.service.close()


def test_deaths_far_apart_are_forgiven(engine_dir):
    watched = Watched(engine_dir, max_deaths=2, deaths_window_s=0)
    for _ in range(2):
        watched.signal(signal.SIGKILL)
        wait_until(lambda: watched.service.worker_pid is None)
    assert Asked(watched.service, SHORT).last().finish_reason == "length"
    assert watched.restarts == 2
    watched.service.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [(FileNotFoundError("no /tmp"), "cannot be started (no /tmp)"), (RuntimeError("a bug"), "internal error (RuntimeError)")],
)
def test_a_worker_that_cannot_be_started_again_ends_all_requests(engine_dir, monkeypatch, error, words):
    """Whatever goes wrong in the supervising thread; however long each attempt takes."""
    watched = Watched(engine_dir, max_deaths=3, deaths_window_s=0.01)
    monkeypatch.setattr("contract.own_directory.tempfile.mkdtemp", partial(slowly_raised, error))
    wait_until(lambda: watched.service.worker_pid is not None)
    asked = Asked(watched.service, ENDLESS)
    watched.signal(signal.SIGKILL)
    assert asked.last().code == "ABORTED"
    assert words in watched.gave_up.get(timeout=TIMEOUT_S)
    with pytest.raises(RequestError, match="load the model again"):
        Asked(watched.service, SHORT)
    watched.service.close()


def slowly_raised(error: Exception, **_) -> None:
    time.sleep(0.02)
    raise error


def test_a_first_worker_that_cannot_be_started_says_why(engine_dir, monkeypatch):
    monkeypatch.setattr("backend.worker_process.Pipe", partial(slowly_raised, OSError(24, "Too many open files")))
    with pytest.raises(WorkerError, match=r"engine worker: cannot be started .*Too many open files"):
        Watched(engine_dir)


def test_what_waits_for_a_worker_is_measured(engine_dir):
    """From the moment it is submitted, in this process and in the next worker."""
    watched = Watched(engine_dir)
    watched.signal(signal.SIGKILL)
    wait_until(lambda: watched.service.worker_pid is None)
    began_s = time.monotonic()
    asked = [Asked(watched.service, SHORT) for _ in range(2)]
    wait_until(lambda: watched.gauge("queued_requests") == 2)
    assert [each.last().finish_reason for each in asked] == ["length", "length"]
    wait_until(lambda: watched.gauge("queued_requests") == 0)
    wait_until(lambda: (found := watched.histogram("queue_seconds")) and sum(found.counts) == 2)
    observed = watched.histogram("queue_seconds")
    assert 0.2 < observed.sum <= 2 * (time.monotonic() - began_s)
    watched.service.close()


def test_the_worker_ends_with_its_parent(engine_dir):
    program = f"""
from pathlib import Path
from backend.service import Service
from backend.service_limits import ServiceLimits
from backend.worker_process import WorkerConfig
service = Service(WorkerConfig(engine_dir=Path({str(engine_dir)!r})), ServiceLimits())
print(service.worker_pid, flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, signal.SIGSTOP)  # it cannot see the connection close
        parent.kill()
    wait_until(lambda: not is_running(worker))


def is_running(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty of a zombie
    except OSError:
        return False


def test_closing_refuses_new_requests_and_fails_the_rest(engine_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    watched = Watched(engine_dir)
    pid = watched.worker_pid()
    assert list(tmp_path.glob("*/aotinductor*"))  # the worker's programs
    asked = Asked(watched.service, ENDLESS)
    asked.next()
    watched.service.close(timeout_s=0)
    error = asked.last()
    assert (error.code, "shutting down" in str(error)) == ("UNAVAILABLE", True)
    with pytest.raises(RequestError, match="shutting down"):
        Asked(watched.service, SHORT)
    assert not Path(f"/proc/{pid}").exists()
    assert list(tmp_path.iterdir()) == []


def test_closing_lets_requests_finish(engine_dir):
    watched = Watched(engine_dir)
    asked = Asked(watched.service, SHORT)
    watched.service.close(timeout_s=TIMEOUT_S)
    assert asked.last().finish_reason == "length"


def test_the_queue_has_a_length_and_a_time_out(engine_dir):
    watched = Watched(engine_dir, max_sequences=1, max_queued=1, queue_timeout_s=5.0)
    running = Asked(watched.service, ENDLESS)
    running.next()
    waiting = Asked(watched.service, SHORT)
    with pytest.raises(RequestError, match="got 1 waiting requests, at most 1") as caught:
        Asked(watched.service, SHORT)
    assert caught.value.code == "UNAVAILABLE"
    error = waiting.last()
    assert (error.code, "at most 5 s" in str(error)) == ("DEADLINE_EXCEEDED", True)
    watched.service.cancel(running.handle)
    assert Asked(watched.service, SHORT).last().finish_reason == "length"
    watched.service.close()


def test_a_queue_without_places_still_serves_what_fits_the_batch(engine_dir):
    """Two at once, before the worker could start either."""
    watched = Watched(engine_dir, max_sequences=2, max_queued=0)
    both = [Asked(watched.service, ENDLESS) for _ in range(2)]
    with pytest.raises(RequestError, match="got 0 waiting requests, at most 0"):
        Asked(watched.service, SHORT)
    assert all(isinstance(asked.next(), CanvasOutput) for asked in both)
    watched.service.close(timeout_s=0)


def test_a_request_that_is_made_ready_has_its_place_from_its_arrival(engine_dir):
    watched = Watched(engine_dir, max_sequences=1, max_queued=1, queue_timeout_s=1000)
    arrived_at_s = time.monotonic() - 100
    for owner in ("a", "b"):
        watched.service.announce(owner, arrived_at_s)
    wait_until(lambda: watched.gauge("queued_requests") == 2)
    for ask in (lambda: watched.service.announce("c", arrived_at_s), lambda: Asked(watched.service, SHORT)):
        with pytest.raises(RequestError, match="got 1 waiting requests, at most 1") as caught:
            ask()
        assert caught.value.code == "UNAVAILABLE"
    assert watched.service.overdue("a") is watched.service.overdue("unknown") is None
    for owner in ("b", "b", "unknown"):
        watched.service.withdraw(owner)
    outputs = [queue.Queue(), queue.Queue()]
    watched.service.submit([5, 6], SHORT, outputs[0].put)  # in the place of b
    watched.service.submit([5, 6], SHORT, outputs[1].put, owner="a")
    assert [output.get(timeout=TIMEOUT_S).finish_reason for output in outputs] == ["length", "length"]
    wait_until(lambda: watched.gauge("queued_requests") == 0)
    for name in ("queue_seconds", "first_canvas_seconds"):
        wait_until(lambda name=name: (found := watched.histogram(name)) and sum(found.counts) == 2)
        assert watched.histogram(name).sum >= 100
    watched.service.close()


def test_a_request_that_is_made_ready_for_too_long_is_overdue(engine_dir):
    watched = Watched(engine_dir, queue_timeout_s=50)
    watched.service.announce("a", time.monotonic() - 100)
    error = watched.service.overdue("a")
    assert (error.code, str(error)) == ("DEADLINE_EXCEEDED", "queue: waited 100 s, at most 50 s; try again later")
    watched.service.withdraw("a")
    assert watched.service.overdue("a") is None
    watched.service.close()


@pytest.mark.parametrize(
    ("name", "keep", "words"),
    [
        ("denoise.pt2", 0.5, ["denoise.pt2", "--force"]),
        ("encode.pt2", 0.0, ["encode.pt2", "--force"]),
        ("manifest.json", 0.5, ["manifest.json", "--force"]),
        ("tokenizer.json", 0.5, ["tokenizer.json", "--force"]),
        ("generation_config.json", 0.5, ["generation_config.json"]),
    ],
)
def test_an_engine_that_cannot_be_used_says_why_in_one_line(engine_dir, tmp_path, name, keep, words):
    engine = damaged_engine(engine_dir, tmp_path / "engine", name, keep=keep)
    with pytest.raises(WorkerError) as caught:
        Watched(engine)
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)
