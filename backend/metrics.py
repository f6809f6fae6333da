"""The server's metrics: one table that says what there is, and the values of one process, handed on as increments.

    process that counts                                    process that exports
    MetricValues ── drain() ──▶ MetricsDelta (picklable) ──▶ Triton's metric families, prometheus_client, a log line

Names are written here without PREFIX. Counters and histograms only grow, gauges are replaced. A histogram can be exported as
one, or, where the exporter knows counters alone, as the counters that Prometheus reads as one: NAME_bucket{le}, NAME_sum and
NAME_count. `flat_series` declares those, and `MetricsDelta.flat` gives their increments.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

PREFIX = "diffusiongemma_"

Kind = Literal["counter", "gauge", "histogram"]
Outcome = Literal["success", "cancelled", "rejected", "failed"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric. `label` and `label_values`: its one label and every value that it takes, or neither. `buckets`: upper bounds
    of a histogram's buckets, ascending, without the last one, which is infinite."""

    name: str
    kind: Kind
    help: str
    label: str | None = None
    label_values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _counter(name: str, help: str, label: str | None = None, label_values: tuple[str, ...] = ()) -> Metric:
    return Metric(name=name, kind="counter", help=help, label=label, label_values=label_values)


def _gauge(name: str, help: str, label: str | None = None, label_values: tuple[str, ...] = ()) -> Metric:
    return Metric(name=name, kind="gauge", help=help, label=label, label_values=label_values)


def _histogram(name: str, help: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name=name, kind="histogram", help=help, buckets=buckets)


_OUTCOMES = ("success", "cancelled", "rejected", "failed")
_LAYER_TYPES = ("sliding_attention", "full_attention")

METRICS = (
    _counter(
        "requests_total",
        "Requests that ended: success, cancelled, rejected (refused, or given up while queued), failed (an error after that)",
        "outcome",
        _OUTCOMES,
    ),
    _gauge("active_requests", "Requests that hold a place in the batch"),
    _gauge("queued_requests", "Requests that wait for a place in the batch"),
    _counter("input_tokens_total", "Prompt tokens of the requests that were admitted"),
    _counter("output_tokens_total", "Tokens sent"),
    _histogram("queue_seconds", "Time from a request's arrival to its admission", _SECONDS),
    _histogram("first_canvas_seconds", "Time from a request's arrival to its first canvas", _SECONDS),
    _histogram("canvas_seconds", "Time from the first denoising step of a canvas to its text", _SECONDS),
    _histogram("canvas_steps", "Denoising steps of a canvas", _STEPS),
    _gauge("kv_pages_used", "KV pages that requests hold", "layer_type", _LAYER_TYPES),
    _gauge("kv_pages_cached", "KV pages that no request holds and the prefix cache keeps", "layer_type", _LAYER_TYPES),
    _gauge("kv_pages", "KV pages that there are", "layer_type", _LAYER_TYPES),
    _counter("prefix_cache_lookup_tokens_total", "Prompt tokens that were looked up in the prefix cache"),
    _counter("prefix_cache_hit_tokens_total", "Prompt tokens that the prefix cache had, and that were not encoded again"),
    _counter("worker_restarts_total", "Times that the engine's worker process was started again"),
)

_BY_NAME = {metric.name: metric for metric in METRICS}


class Series(NamedTuple):
    """One series: a metric's name (without PREFIX) and the value of its label; "" for a metric without one."""

    name: str
    label_value: str = ""


@dataclass(frozen=True, kw_only=True)
class HistogramDelta:
    """Observations since the last drain: how many in each bucket (not cumulative; the last is the infinite one), their sum."""

    counts: tuple[int, ...]
    sum: float


class FlatSeries(NamedTuple):
    """A counter or gauge with its full name, as exporters without histograms declare it."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[tuple[str, str], ...]


class FlatValue(NamedTuple):
    """The increment of a counter or the value of a gauge; (name, labels) are those of one FlatSeries."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


@dataclass(frozen=True, kw_only=True)
class MetricsDelta:
    """What happened since the last drain: increments of counters, values of gauges, observations of histograms, by series.
    Picklable. Series that did not change are left out, but for gauges, which are all there once set."""

    counters: dict[Series, float] = field(default_factory=dict)
    gauges: dict[Series, float] = field(default_factory=dict)
    histograms: dict[Series, HistogramDelta] = field(default_factory=dict)

    def flat(self) -> Iterator[FlatValue]:
        """Everything as counters' increments and gauges' values; a histogram gives its cumulative buckets, sum and count."""
        for series, value in (*self.counters.items(), *self.gauges.items()):
            yield FlatValue(PREFIX + series.name, _labels(_BY_NAME[series.name], series.label_value), value)
        for series, histogram in self.histograms.items():
            name, count = PREFIX + series.name, 0
            for bound, each in zip(_bounds(_BY_NAME[series.name]), histogram.counts, strict=True):
                count += each
                yield FlatValue(f"{name}_bucket", (("le", bound),), count)
            yield FlatValue(f"{name}_sum", (), histogram.sum)
            yield FlatValue(f"{name}_count", (), count)


def flat_series() -> Iterator[FlatSeries]:
    """Every series that `MetricsDelta.flat` can give, so that all of them can be exported, at 0, from the start."""
    for metric in METRICS:
        name = PREFIX + metric.name
        if metric.kind == "histogram":
            for bound in _bounds(metric):
                yield FlatSeries(f"{name}_bucket", "counter", metric.help, (("le", bound),))
            yield FlatSeries(f"{name}_sum", "counter", metric.help, ())
            yield FlatSeries(f"{name}_count", "counter", metric.help, ())
        else:
            for value in metric.label_values or ("",):
                yield FlatSeries(name, metric.kind, metric.help, _labels(metric, value))


class MetricValues:
    """The values of one process. Every method may be called from any thread; each costs a lock and a dictionary entry."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counters: dict[Series, float] = {}
        self._gauges: dict[Series, float] = {}
        self._counts: dict[Series, list[int]] = {}
        self._sums: dict[Series, float] = {}

    def count(self, name: str, increment: float = 1, label_value: str = "") -> None:
        """Adds to a counter."""
        series = _series(name, "counter", label_value)
        with self._lock:
            self._counters[series] = self._counters.get(series, 0) + increment

    def set(self, name: str, value: float, label_value: str = "") -> None:
        """Sets a gauge."""
        series = _series(name, "gauge", label_value)
        with self._lock:
            self._gauges[series] = value

    def set_each(self, name: str, values: Mapping[str, float]) -> None:
        """Sets a gauge for each value of its label."""
        for label_value, value in values.items():
            self.set(name, value, label_value)

    def observe(self, name: str, value: float) -> None:
        """Adds an observation to a histogram; a value equal to a bucket's bound is in that bucket."""
        series = _series(name, "histogram", "")
        buckets = _BY_NAME[name].buckets
        with self._lock:
            counts = self._counts.setdefault(series, [0] * (len(buckets) + 1))
            counts[bisect_left(buckets, value)] += 1
            self._sums[series] = self._sums.get(series, 0.0) + value

    def drain(self) -> MetricsDelta:
        """What was added since the last call, and every gauge; counters and histograms start again from nothing."""
        with self._lock:
            histograms = {
                series: HistogramDelta(counts=tuple(counts), sum=self._sums[series]) for series, counts in self._counts.items()
            }
            delta = MetricsDelta(counters=self._counters, gauges=dict(self._gauges), histograms=histograms)
            self._counters, self._counts, self._sums = {}, {}, {}
        return delta


def _series(name: str, kind: Kind, label_value: str) -> Series:
    """The series, which must be one of the table: a misspelt name would be a metric that nobody exports."""
    metric = _BY_NAME.get(name)
    if metric is None or metric.kind != kind or label_value not in (metric.label_values or ("",)):
        raise ValueError(f"metric: got {kind} {name!r} with label {label_value!r}, expected one of the table METRICS")
    return Series(name, label_value)


def _labels(metric: Metric, label_value: str) -> tuple[tuple[str, str], ...]:
    return ((metric.label, label_value),) if metric.label else ()


def _bounds(metric: Metric) -> tuple[str, ...]:
    return (*(f"{bound:g}" for bound in metric.buckets), "+Inf")
