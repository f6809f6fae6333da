"""A run's entry in the dated log: every figure, every goal, every failure."""

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from measuring import Report, figure


def log_entry(day: date, machine: Mapping[str, object], reports: Sequence[Report], failures: Mapping[str, str]) -> str:
    """Markdown. failures: benchmark → why it has no figures."""
    lines = [f"## {day}, `make bench` on {machine['cores']} CPU cores", ""]
    lines += [", ".join(f"{name} {value}" for name, value in machine.items()) + ".", ""]
    for report in reports:
        lines += [f"{report.benchmark}", "", "| case | system | figure | spread | of the first |", "|---|---|---|---|---|"]
        for row in report.rows:
            spread = "" if row.spread is None else f"{row.spread:.0%}"
            lines.append(f"| {row.case} | {row.system} | {figure(row)} | {spread} | {report.share(row)} |")
        lines += ["", *(f"- {goal.line()}" for goal in report.goals), *(f"- {note}" for note in report.notes)]
        lines.append("")
    lines += [f"Failed: {name}: {why}" for name, why in failures.items()]
    return "\n".join(lines).rstrip() + "\n"


def prepend(path: Path, entry: str) -> None:
    """Puts the entry above the first one in the file."""
    title, mark, rest = path.read_text().partition("\n## ")
    path.write_text(f"{title}\n{entry}{mark}{rest}")
