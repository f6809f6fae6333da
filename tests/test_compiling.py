"""A build's processes: they end with it, and it ends with them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_checkpoints import TINY
from waiting import wait_until

from builder import compiling
from builder.compiling import compile_programs
from builder.config import read_model_config
from builder.errors import BuildError
from builder.processes import processes
from contract.manifest import BuildConfig, Program

PARENT = """
import os, signal
from builder.processes import processes
if __name__ == "__main__":
    with processes(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(signal.pause)
        signal.pause()
"""
ENDED = """
from builder.processes import processes
from tqdm import tqdm
if __name__ == "__main__":
    with processes(1) as pool:
        pool.submit(tqdm.get_lock).exception()
        raise SystemExit(143)
"""


def started(count: int) -> list[multiprocessing.Process]:
    """This process's children, once there are so many."""
    wait_until(lambda: len(multiprocessing.active_children()) == count)
    return multiprocessing.active_children()


@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt, ValueError])
def test_processes_end_with_the_build(stop):
    with pytest.raises(stop), processes(2) as pool:
        for _ in range(3):
            pool.submit(time.sleep, 600)
        started(2)
        raise stop
    assert multiprocessing.active_children() == []


def script(tmp_path: Path, text: str) -> dict:
    """Of `subprocess`: how to run it."""
    (tmp_path / "script.py").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return {"args": [sys.executable, tmp_path / "script.py"], "env": environment, "text": True, "stdout": subprocess.PIPE}


def test_a_build_that_is_ended_leaves_no_word_of_its_processes(tmp_path):
    ended = subprocess.run(**script(tmp_path, ENDED), stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (143, "")


def test_processes_end_with_a_build_that_is_killed(tmp_path):
    with subprocess.Popen(**script(tmp_path, PARENT)) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    wait_until(lambda: not Path(f"/proc/{child}").exists())


def test_a_process_that_is_ended_ends_the_build_in_one_line():
    with pytest.raises(BuildError) as refused, processes(2) as pool:
        running = pool.submit(time.sleep, 600)
        pool.submit(int).result()  # by now both are watched
        os.kill(started(2)[0].pid, signal.SIGKILL)
        running.result()
    assert str(refused.value).startswith("compiling: a process was ended from outside, most likely because memory was short;")
    assert multiprocessing.active_children() == []


def test_interrupts_are_the_builders():
    """A terminal sends them to all of its processes."""
    with processes(1) as pool:
        assert signal.SIGINT in pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, []).result()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_programs_for_a_cpu_are_compiled_in_a_process_of_their_own(tmp_path, monkeypatch):
    """An exception that a signal handler raises inside of PyTorch may end the process as a crash does."""
    numbers, lines = [], []

    def recorded(at_once: int) -> ThreadPoolExecutor:
        numbers.append(at_once)
        return ThreadPoolExecutor(at_once)

    monkeypatch.setattr(compiling, "processes", recorded)
    monkeypatch.setattr(
        compiling, "_compile", lambda model, build, name, *_: Program(file=name, inputs=(), weights=(), outputs=())
    )
    build = BuildConfig(target="inductor", dtype="float32")
    programs = compile_programs(read_model_config(TINY), build, tmp_path, lines.append)
    assert numbers == [1] and [program.file for program in programs.values()] == ["encode", "denoise", "head", "vision"]
    assert lines[1:] == ["compiled encode", "compiled denoise", "compiled head", "compiled vision"]
