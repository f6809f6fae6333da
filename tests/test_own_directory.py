"""Temporary directories: removed by those who made them, or by the next one when they were killed."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from waiting import wait_until

from backend.worker_process import WorkerConfig, WorkerProcess
from contract.own_directory import own_directory

PARENT = """
import sys
from pathlib import Path
from backend.worker_process import WorkerConfig, WorkerProcess
worker = WorkerProcess(WorkerConfig(engine_dir=Path(sys.argv[1])))
while worker.receive(1.0) is None:
    pass
print("loaded", flush=True)
input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_what_a_killed_parent_left_behind_is_removed_by_the_next(engine_dir, temporary):
    command = [sys.executable, "-c", PARENT, str(engine_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "loaded\n"
        [directory] = temporary.iterdir()
        WorkerProcess(WorkerConfig(engine_dir=engine_dir)).end()
        assert any(directory.iterdir())  # it lives
        os.kill(parent.pid, signal.SIGKILL)

    def is_removed() -> bool:
        """The worker may write for as long as it takes to die with its parent."""
        WorkerProcess(WorkerConfig(engine_dir=engine_dir)).end()
        return not directory.exists()

    wait_until(is_removed)
    assert list(temporary.iterdir()) == []


def test_a_new_directory_that_is_not_locked_yet_stays(temporary):
    new = temporary / "diffusiongemma_worker_new"
    new.mkdir()
    with own_directory("diffusiongemma_worker_"):
        assert new.exists()


def test_a_link_leads_to_nothing_that_is_removed(temporary):
    kept = temporary / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (temporary / "diffusiongemma_worker_link").symlink_to(kept)
    with own_directory("diffusiongemma_worker_"):
        assert (kept / "file").exists()
