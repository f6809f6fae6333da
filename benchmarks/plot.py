"""One picture of a run: a panel a benchmark and unit, a group of bars a case, a colour a system."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from measuring import Report, Row, figure

_COLUMNS = 2
_PANEL_INCHES = (7.5, 4.0)


def plot(reports: list[Report], title: str, path: Path) -> None:
    """Writes a PNG."""
    panels = [(report, unit) for report in reports for unit in dict.fromkeys(row.unit for row in report.rows)]
    num_rows = max(1, -(-len(panels) // _COLUMNS))
    width, height = _PANEL_INCHES
    drawing, axes = plt.subplots(num_rows, _COLUMNS, figsize=(width * _COLUMNS, height * num_rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _panel(axis, *panel)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    drawing.suptitle(title)
    drawing.tight_layout(rect=(0, 0, 1, 0.98))
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def _panel(axis: Axes, report: Report, unit: str) -> None:
    rows = [row for row in report.rows if row.unit == unit]
    cases, systems = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("case", "system"))
    colours = dict(zip(systems, plt.get_cmap("tab10").colors * len(systems), strict=False))
    position, ticks, labelled = 0.0, [], set()
    for case in cases:
        bars: list[Row] = [row for row in rows if row.case == case]
        ticks.append((position + 0.5 * (len(bars) - 1), case))
        for row in bars:
            axis.barh(position, row.value, color=colours[row.system], label=None if row.system in labelled else row.system)
            axis.text(row.value, position, f" {figure(row)}", va="center", fontsize=7)
            labelled.add(row.system)
            position += 1
        position += 0.6
    axis.set_yticks([each for each, _ in ticks], [case for _, case in ticks], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_xlabel(unit)
    axis.set_title(f"{report.benchmark}: {unit}", fontsize=10)
    axis.legend(fontsize=7)
