"""Commands whose standard streams are closed, full, or read no more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMAND = """
import sys
from contract.standard_streams import standard_streams
with standard_streams():
    opened = open(sys.argv[0])
    assert opened.fileno() > 2
    print(sys.stdin.read() + "written")
    print("told", file=sys.stderr)
    sys.exit(3)
"""


@pytest.fixture
def run(tmp_path):
    """Runs COMMAND with a redirection of the shell. Returns its exit status and what is on the others of its streams."""
    (tmp_path / "command.py").write_text(COMMAND)

    def ran(redirection: str) -> tuple[int, str, str]:
        command = f"{sys.executable} {tmp_path}/command.py {redirection}"
        environment = {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, input="read ", env=environment)
        return done.returncode, done.stdout, done.stderr

    return ran


@pytest.mark.parametrize(
    ("redirection", "status", "stdout", "stderr"),
    [
        ("", 3, "read written\n", "told\n"),
        ("<&-", 3, "written\n", "told\n"),
        (">&-", 3, "", "told\n"),
        ("2>&-", 3, "read written\n", ""),
        ("<&- >&- 2>&-", 3, "", ""),
        (
            "> /dev/full",
            1,
            "",
            "told\nerror: standard output: cannot be written (No space left on device); make room, or write elsewhere\n",
        ),
    ],
    ids=["open", "no input", "no output", "no errors", "none", "full"],
)
def test_a_command(redirection, status, stdout, stderr, run):
    assert run(redirection) == (status, stdout, stderr)


def test_a_pipe_whose_reader_has_gone(tmp_path):
    (tmp_path / "command.py").write_text(COMMAND)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, tmp_path / "command.py"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)}
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"told\n")
