"""The Grafana dashboard asks only for series that the server exports, and for all that it measures."""

import json
import re
from pathlib import Path

from backend.metrics import METRICS, PREFIX, flat_series

DASHBOARD = Path(__file__).parent.parent / "deploy" / "grafana" / "diffusiongemma.json"
EXPORTED_LABELS = {"model", "instance"}  # of every series, beside its own


def queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = [each["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    return variables + [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_queries_name_series_that_exist():
    named = {name for query in queries() for name in re.findall(rf"\b{PREFIX}\w+", query)}
    assert named <= {series.name for series in flat_series()}


def test_every_metric_is_shown():
    text = "\n".join(queries())
    assert [metric.name for metric in METRICS if PREFIX + metric.name not in text] == []


def test_queries_group_by_labels_that_exist():
    labels = EXPORTED_LABELS | {name for series in flat_series() for name, _ in series.labels}
    used = {name for query in queries() for name in re.findall(r"by \((\w+)\)", query)}
    used |= {name for query in queries() for name in re.findall(r"(\w+)=~", query)}
    assert used and used <= labels


def test_panels_do_not_overlap():
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
