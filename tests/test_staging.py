"""A finished directory in the place of another: whole at every moment, whatever fails."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from builder import staging
from builder.errors import BuildError
from builder.staging import staged

OLD, NEW = (json.dumps({"checkpoint": {"path": path, "files": {}}}) for path in ("old", "new"))


@pytest.fixture
def engine(tmp_path):
    place = tmp_path / "engines" / "e"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text(OLD)
    return place


def replace(engine) -> None:
    with staged(engine) as directory:
        (directory / "manifest.json").write_text(NEW)


def assert_replaced(engine) -> None:
    assert (engine / "manifest.json").read_text() == NEW
    assert [path.name for path in engine.parent.iterdir()] == ["e"]


def test_an_engine_is_exchanged_without_a_moment_in_which_there_is_none(engine, monkeypatch):
    monkeypatch.setattr(os, "replace", None)
    replace(engine)
    assert_replaced(engine)


def test_where_directories_cannot_be_exchanged_one_takes_the_others_place(engine, monkeypatch):
    assert not staging._exchanged(engine, engine.parent / "nowhere")
    monkeypatch.setattr(staging, "_exchanged", lambda left, right: False)
    replace(engine)
    assert_replaced(engine)


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_old_engine_that_cannot_be_removed_fails_no_build(exchanges, engine, monkeypatch):
    def remove(directory, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(directory)

    monkeypatch.setattr(shutil, "rmtree", remove)
    if not exchanges:
        monkeypatch.setattr(staging, "_exchanged", lambda left, right: False)
    replace(engine)
    assert (engine / "manifest.json").read_text() == NEW


KILLED = """
import os, signal, sys
from pathlib import Path
from builder.staging import staged
with staged(Path(sys.argv[1])) as directory:
    (directory / "manifest.json").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_build_left_behind_is_removed_by_the_next(engine):
    assert subprocess.run([sys.executable, "-c", KILLED, engine]).returncode == -signal.SIGKILL
    assert len(list(engine.parent.iterdir())) == 2
    assert (engine / "manifest.json").read_text() == OLD
    replace(engine)
    assert_replaced(engine)


def test_what_another_build_is_writing_stays(engine):
    with staged(engine) as directory:
        (directory / "manifest.json").touch()
        replace(engine)
        assert (directory / "manifest.json").exists()


def test_only_what_puts_it_in_place_is_called_writing(engine):
    with pytest.raises(FileNotFoundError, match="a checkpoint's"), staged(engine):
        raise FileNotFoundError("a checkpoint's")
    with pytest.raises(BuildError, match=r"e/manifest\.json/e: cannot be written"), staged(engine / "manifest.json" / "e"):
        pass


def test_a_mount_point_is_told_before_anything_long(engine, monkeypatch):
    """Of a volume that a container has there: it can be written to, but neither renamed nor exchanged."""
    monkeypatch.setattr(os.path, "ismount", lambda path: path == engine)
    with pytest.raises(BuildError, match="e: is a mount point, whose place no other directory can take"), staged(engine):
        pytest.fail("is not to begin")
    assert (engine / "manifest.json").read_text() == OLD
