"""Metrics: the table, what drains, and histograms flattened to the counters that Prometheus reads as one."""

import pickle

import pytest

from backend.metrics import METRICS, HistogramDelta, MetricValues, Series, flat_series


def test_the_table():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert bool(metric.label) == bool(metric.label_values)
        assert metric.help


def test_a_drain_is_what_was_added_since_the_last():
    values = MetricValues()
    values.count("output_tokens_total", 3)
    values.count("output_tokens_total", 4)
    values.count("requests_total", label_value="failed")
    values.set("active_requests", 5)
    values.set("active_requests", 2)
    for steps in (1, 2, 3, 5, 1000):
        values.observe("canvas_steps", steps)
    delta = pickle.loads(pickle.dumps(values.drain()))
    assert delta.counters == {Series("output_tokens_total"): 7, Series("requests_total", "failed"): 1}
    assert delta.gauges == {Series("active_requests"): 2}
    # Bounds 1, 2, 3, 4, 6, 8 …: 5 is in the bucket up to 6, 1000 in the infinite one.
    assert delta.histograms == {Series("canvas_steps"): HistogramDelta(counts=(1, 1, 1, 0, 1, *[0] * 7, 1), sum=1011)}
    values.count("output_tokens_total")
    delta = values.drain()
    assert (delta.counters, delta.histograms) == ({Series("output_tokens_total"): 1}, {})
    assert delta.gauges == {Series("active_requests"): 2}


def test_flat_histograms_are_cumulative():
    values = MetricValues()
    for steps in (1, 2, 2, 5, 1000):
        values.observe("canvas_steps", steps)
    values.count("requests_total", 2, "cancelled")
    flat = {(name, labels): value for name, labels, value in values.drain().flat()}
    buckets = {
        dict(labels)["le"]: value for (name, labels), value in flat.items() if name == "diffusiongemma_canvas_steps_bucket"
    }
    assert list(buckets.items())[:6] == [("1", 1), ("2", 3), ("3", 3), ("4", 3), ("6", 4), ("8", 4)]
    assert list(buckets.items())[-2:] == [("64", 4), ("+Inf", 5)]
    assert flat["diffusiongemma_canvas_steps_sum", ()] == 1010
    assert flat["diffusiongemma_canvas_steps_count", ()] == 5
    assert flat["diffusiongemma_requests_total", (("outcome", "cancelled"),)] == 2


def test_every_flat_value_was_declared():
    values = MetricValues()
    for metric in METRICS:
        for label_value in metric.label_values or ("",):
            if metric.kind == "counter":
                values.count(metric.name, 1, label_value)
            elif metric.kind == "gauge":
                values.set(metric.name, 1, label_value)
            else:
                values.observe(metric.name, 1)
    declared = [(series.name, series.labels) for series in flat_series()]
    assert len(set(declared)) == len(declared)
    assert sorted(declared) == sorted((name, labels) for name, labels, _ in values.drain().flat())


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (lambda values: values.count("tokens"), "counter 'tokens' with label ''"),
        (lambda values: values.count("active_requests"), "counter 'active_requests' with label ''"),
        (lambda values: values.count("requests_total"), "counter 'requests_total' with label ''"),
        (lambda values: values.set("kv_pages_used", 1, "other"), "gauge 'kv_pages_used' with label 'other'"),
        (lambda values: values.observe("queue_time", 1), "histogram 'queue_time' with label ''"),
    ],
)
def test_only_what_the_table_has(call, shown):
    with pytest.raises(ValueError, match=f"metric: got {shown}, expected one of the table METRICS"):
        call(MetricValues())
