"""What all benchmarks share: systems timed in turns, and the report that is a benchmark's last line.

A report is rows (case, system, value), goals (what was promised and what came out) and notes. Its first row of a case is what
the case's other rows are compared with.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import NoReturn

from rich.console import Console
from rich.progress import Progress
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each round."""

    seconds: list[float]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest minus fastest, as a fraction of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median_s


def in_turns(systems: Mapping[str, Callable[[], object]], rounds: int, *, doing: str = "timing") -> dict[str, Timing]:
    """Runs every system once a round, so that what else the machine does falls on all of them; progress on standard error."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=rounds * len(systems))
        for _ in range(rounds):
            for name, run in systems.items():
                started_s = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started_s)
                progress.advance(task)
    return {name: Timing(seconds=each) for name, each in seconds.items()}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. spread: as in `Timing`."""

    case: str
    system: str
    value: float
    unit: str
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A figure that may be `limit` at most."""

    what: str
    value: float
    limit: float
    unit: str

    @property
    def is_met(self) -> bool:
        return self.value <= self.limit

    def line(self) -> str:
        verdict = "met" if self.is_met else "MISSED"
        return f"goal {verdict}: {self.what}: {self.value:g} {self.unit}, at most {self.limit:g}"


@dataclass(kw_only=True)
class Report:
    """What one benchmark found."""

    benchmark: str
    rows: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, line: str) -> "Report":
        values = json.loads(line)
        rows = [Row(**each) for each in values["rows"]]
        return cls(
            benchmark=values["benchmark"], rows=rows, goals=[Goal(**each) for each in values["goals"]], notes=values["notes"]
        )

    def add(self, case: str, system: str, value: float, unit: str, timing: Timing | None = None) -> None:
        spread = round(timing.spread, 3) if timing else None
        self.rows.append(Row(case=case, system=system, value=float(f"{value:.5g}"), unit=unit, spread=spread))

    def finish(self) -> None:
        """Prints the table, goals and notes, then the JSON line."""
        console = Console()
        console.print(self.table())
        for goal in self.goals:
            console.print(goal.line(), highlight=False)
        for note in self.notes:
            console.print(note, highlight=False)
        print(json.dumps(asdict(self), ensure_ascii=False), flush=True)

    def table(self) -> Table:
        table = Table("case", "system", "figure", "spread", "of the first", title=self.benchmark, title_justify="left")
        for row in self.rows:
            spread = "" if row.spread is None else f"{row.spread:.0%}"
            table.add_row(row.case, row.system, figure(row), spread, self.share(row))
        return table

    def share(self, row: Row) -> str:
        """The row's figure over that of the first row of its case and unit."""
        first = next(each for each in self.rows if (each.case, each.unit) == (row.case, row.unit))
        return "" if first is row or not first.value else f"{row.value / first.value:.2f}x"


def figure(row: Row) -> str:
    digits = 0 if abs(row.value) >= 100 else 1 if abs(row.value) >= 10 else 3
    return f"{row.value:,.{digits}f} {row.unit}" if abs(row.value) >= 1e-3 or not row.value else f"{row.value:.1e} {row.unit}"


def refuse(reason: str) -> NoReturn:
    """Ends the benchmark: a result is wrong, and nothing is timed."""
    sys.exit(f"check failed: {reason}; nothing was timed")
