"""Runs the benchmarks, one process each: progress, a summary, results with a description of the machine, a plot, a log entry.

    python benchmarks/run.py --checkpoint checkpoints/tiny --engine engines/diffusiongemma            # make bench
    python benchmarks/run.py … --quick             the commands, at sizes that say little
    python benchmarks/run.py … --only server       one or several of them
    python benchmarks/run.py … --log               also an entry on top of benchmarks/LOG.md

What each measures is in its own file. Results go to benchmarks/results/<time>/: results.json, plot.png, and the output of
each. A benchmark that fails does not stop the others; it is in the results and the log, and the exit status is 1.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from machine import describe_machine
from measuring import Report
from plot import plot
from records import log_entry, prepend
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from suite import FOLDER, Benchmark, Place, suite

from contract.manifest import FILE_NAME as MANIFEST

ROOT = FOLDER.parent
console = Console()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Either a report or the line that says why there is none."""

    name: str
    seconds: float
    report: Report | None
    failure: str | None


def main() -> None:
    options = _parser().parse_args()
    tiny = Place(checkpoint=options.checkpoint, engine=options.engine)
    small = Place(checkpoint=options.small / "small", engine=options.small / "engines" / "small")
    listed = [each for each in suite(tiny, small) if not (options.quick and each.quick is None)]
    unknown = set(options.only) - {each.name for each in listed}
    if unknown:
        sys.exit(f"--only: got {', '.join(sorted(unknown))}, expected of {', '.join(each.name for each in listed)}")
    chosen = [each for each in listed if not options.only or each.name in options.only]
    now = datetime.now(timezone.utc)
    directory = options.results / now.strftime("%Y-%m-%dT%H%M%SZ")
    directory.mkdir(parents=True)
    outcomes = [
        _run(each, f"[{index}/{len(chosen)}]", tiny, small, directory, options.quick) for index, each in enumerate(chosen, 1)
    ]
    machine = describe_machine()
    record = {"time": now.isoformat(timespec="seconds"), "quick": options.quick, "machine": machine}
    record["benchmarks"] = [asdict(each) for each in outcomes]
    (directory / "results.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    reports = [each.report for each in outcomes if each.report]
    plot(reports, f"{machine['cpu']}, {machine['cores']} cores, {now.date()}", directory / "plot.png")
    summarize(outcomes)
    print(f"results {directory / 'results.json'}  plot {directory / 'plot.png'}")
    if options.log:
        failures = {each.name: each.failure for each in outcomes if each.failure}
        prepend(FOLDER / "LOG.md", log_entry(now.date(), machine, reports, failures))
        print(f"entry added to {FOLDER / 'LOG.md'}")
    sys.exit(any(each.failure for each in outcomes))


def _run(each: Benchmark, place: str, tiny: Place, small: Place, directory: Path, quick: bool) -> Outcome:
    """What it needs, then the benchmark: the first command that fails ends it. place: "[1/9]"."""
    started_s, failure, report = time.perf_counter(), None, None
    log_path = directory / f"{each.name}.log"
    commands = {f"preparing {need}": preparation(need, tiny, small) for need in each.needs}
    commands = {doing: command for doing, command in commands.items() if command} | {"": each.command(quick=quick)}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, log_path.open("a+") as log:
        task = progress.add_task("", total=None)
        for doing, command in commands.items():
            progress.update(task, description=f"{place} {each.name} {doing}")
            done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=log, text=True, check=False)
            if done.returncode:
                log.seek(0)
                failure = ([f"exit code {done.returncode}", *filter(str.strip, log)][-1]).strip()
                break
            log.write(done.stdout)
        else:
            report = Report.from_json(done.stdout.splitlines()[-1])
    seconds = round(time.perf_counter() - started_s, 1)
    console.print(f"{place} {each.name}: {failure or 'done'}, {seconds:.0f} s", markup=False, highlight=False)
    return Outcome(name=each.name, seconds=seconds, report=report, failure=failure)


def preparation(need: str, tiny: Place, small: Place) -> list[str]:
    """The command that makes what is needed, none if it is there. An engine of `tiny` is the user's, and taken as it is."""
    if need == "small checkpoint":
        return [] if small.checkpoint.exists() else [str(FOLDER / "small_checkpoint.py"), str(small.checkpoint)]
    place = {"tiny": tiny, "small": small}[need]
    if place is tiny and (tiny.engine / MANIFEST).exists():
        return []
    build = ["-m", "builder", "build", str(place.checkpoint), str(place.engine)]
    return [*build, "--target", "inductor", "--dtype", "float32", "--device", "cpu"]


def summarize(outcomes: list[Outcome]) -> None:
    """Every table, then the goals."""
    for outcome in outcomes:
        if outcome.report:
            console.print(outcome.report.table())
    for outcome in outcomes:
        for goal in outcome.report.goals if outcome.report else ():
            console.print(goal.line(), highlight=False, markup=False)
        if outcome.failure:
            console.print(f"FAILED {outcome.name}: {outcome.failure}", highlight=False, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="the tiny one, or one like it")
    parser.add_argument("--engine", type=Path, required=True, help="its engine; built if needed")
    parser.add_argument(
        "--small", type=Path, default=ROOT / "build" / "benchmarks", help="where `small` and its engine are kept"
    )
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a minute or two, without `small`")
    parser.add_argument("--log", action="store_true", help="add an entry to benchmarks/LOG.md")
    return parser


if __name__ == "__main__":
    main()
