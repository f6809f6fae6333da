"""How far TensorRT is with a build, as bars on a console."""

from contextlib import ExitStack
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID


def progress_monitor(trt: ModuleType, console: Console, title: str, stack: ExitStack) -> Any:
    """A `tensorrt.IProgressMonitor` that shows a bar for each phase of the build, until `stack` is closed.

    TensorRT calls it from its own threads; `rich` takes that.
    """
    progress = stack.enter_context(Progress(console=console, transient=True))

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.bars: dict[str, TaskID] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.bars[phase_name] = progress.add_task(f"{title}: {phase_name}", total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.update(self.bars[phase_name], completed=step + 1)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            progress.remove_task(self.bars.pop(phase_name))

    return Monitor()
