"""The metrics of `backend.metrics` as Triton's own, on the server's /metrics. Imports only inside a server's Python backend.

A worker hands on whole buckets, which Triton's histograms cannot take; so a histogram is exported as the counters that
Prometheus reads as one: NAME_bucket{le}, NAME_sum and NAME_count.
"""

import time
from collections.abc import Mapping

import triton_python_backend_utils as pb_utils

from backend.metrics import MetricsDelta, flat_series

_AGAIN_INTERVAL_S = 5.0  # Prometheus asks every 15 s


class ExportedMetrics:
    """Every series of the table with `labels`, at 0 from the start. Counters go on where an earlier load of the model left
    them: the server keeps them. When the model is loaded again, the instance that was there sets the same gauges until it has
    ended, so `apply` sets all of them again from time to time. One thread."""

    def __init__(self, labels: Mapping[str, str]):
        # Looked up here, because the server adds these to the module only after it has imported the model.
        kinds = {"counter": pb_utils.MetricFamily.COUNTER, "gauge": pb_utils.MetricFamily.GAUGE}
        self._families = {}
        self._series = {}
        self._gauges: dict[object, float] = {}
        self._again_at_s = time.monotonic() + _AGAIN_INTERVAL_S
        for series in flat_series():
            if series.name not in self._families:
                self._families[series.name] = pb_utils.MetricFamily(
                    name=series.name, description=series.help, kind=kinds[series.kind]
                )
            metric = self._families[series.name].Metric(labels=dict(labels) | dict(series.labels))
            self._series[series.name, series.labels] = metric
            if series.kind == "gauge":
                self._set(metric, 0.0)

    def apply(self, delta: MetricsDelta) -> None:
        for value in delta.flat():
            metric = self._series[value.name, value.labels]
            if metric in self._gauges:
                self._set(metric, value.value)
            elif value.value:
                metric.increment(value.value)
        if time.monotonic() >= self._again_at_s:
            for metric, value in self._gauges.items():
                metric.set(value)
            self._again_at_s = time.monotonic() + _AGAIN_INTERVAL_S

    def clear_gauges(self) -> None:
        """What a worker had is gone with it."""
        for metric in self._gauges:
            self._set(metric, 0.0)

    def _set(self, metric, value: float) -> None:
        if self._gauges.get(metric) != value:  # a call costs a message to the server
            metric.set(value)
            self._gauges[metric] = value
