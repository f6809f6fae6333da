"""The Makefile: when it builds an engine, with which Python it makes its environment, which tests it runs on a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_checkpoints import TINY

from builder.build import write_manifest

ROOT = Path(__file__).parent.parent


class Make:
    """Runs `make` with a virtual environment of one script, which writes down what it is asked for."""

    def __init__(self, directory: Path):
        self.directory, self.venv, self.engine = directory, directory / "venv", directory / "my engine"
        self._asked = directory / "asked"
        self.python("venv/bin/python", "3.11.7")
        (self.venv / ".installed").touch()

    def __call__(self, target: str, *variables: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Without the variables of the `make test` that may run this."""
        self._asked.unlink(missing_ok=True)
        command = ["make", target, f"VENV={self.venv}", f"ENGINE={self.engine}", *variables]
        environment |= {"PATH": os.environ["PATH"]}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    def asked(self) -> list[str]:
        return self._asked.read_text().splitlines() if self._asked.exists() else []

    def python(self, name: str, version: str, status: int = 0) -> Path:
        """The script: it knows its version, also in Python, and ends with `status` when it is asked for anything else."""
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        as_version = f"import sys; sys.version_info = ({version.replace('.', ', ')})"
        path.write_text(f"""#!/bin/sh
case "$1" in
    -V) echo Python {version} ;;
    -c) exec "{sys.executable}" -c "{as_version}; $2" ;;
    *) printf '%s|' "$@" >> '{self._asked}'; echo >> '{self._asked}'; exit {status} ;;
esac
""")
        path.chmod(0o755)
        return path


@pytest.fixture
def make(tmp_path) -> Make:
    return Make(tmp_path)


@pytest.fixture
def built(make) -> Path:
    make.engine.mkdir()
    for name in ("manifest.json", "denoise.pt2"):
        (make.engine / name).touch()
    return make.engine


# -- The engine


@pytest.mark.parametrize("target", ["serve", "demo", "bench"])
def test_what_is_not_there_is_built(target, make):
    assert make(target, "CHECKPOINT=my checkpoint").returncode == 0
    build, run = make.asked()
    assert (
        build == f"-m|builder|build|my checkpoint|{make.engine}|--target|auto|--dtype|auto|--device|auto|--expert-weights|auto|"
    )
    assert f"|{make.engine}|" in run and ("--checkpoint|" not in run or "|my checkpoint|" in run)


@pytest.mark.parametrize("target", ["serve", "demo", "bench"])
def test_what_is_there_is_taken_as_it_is(target, make, built):
    assert make(target).returncode == 0
    (run,) = make.asked()
    assert f"|{built}|" in run


@pytest.mark.parametrize("by", ["command line", "environment"])
@pytest.mark.parametrize(
    "variable", ["CHECKPOINT=mine", "TARGET=inductor", "DTYPE=float32", "DEVICE=cpu", "EXPERT_WEIGHTS=int4"]
)
def test_the_builder_is_asked_whether_what_is_there_is_what_was_asked_for(variable, by, make, built):
    name, value = variable.split("=")
    done = make("serve", variable) if by == "command line" else make("serve", **{name: value})
    build, run = make.asked()
    assert (done.returncode, run) == (0, f"-m|backend|serve|--engine|{built}|")
    assert build.startswith("-m|builder|build|") and f"|{value}|" in build


def test_an_empty_variable_of_the_environment_says_nothing(make, built):
    empty = dict.fromkeys(("CHECKPOINT", "TARGET", "DTYPE", "DEVICE", "EXPERT_WEIGHTS"), "")
    assert make("serve", **empty).returncode == 0
    assert make.asked() == [f"-m|backend|serve|--engine|{built}|"]
    assert make("engine", **empty).returncode == 0
    assert "|--target|auto|--dtype|auto|--device|auto|--expert-weights|auto|" in make.asked()[0]


def test_what_the_builder_refuses_is_not_served(make, built):
    make.python("venv/bin/python", "3.11.7", status=1)
    assert make("serve", "CHECKPOINT=another").returncode
    (build,) = make.asked()
    assert build.startswith("-m|builder|build|another|")


def test_a_manifest_alone_is_no_engine(make):
    write_manifest(TINY, make.engine)
    make("serve")
    assert [line.split("|")[1] for line in make.asked()] == ["builder", "backend"]


# -- The environment


@pytest.mark.parametrize("version", ["3.9.18", "3.13.0"])
def test_a_python_that_does_not_fit_is_refused_before_anything_is_done(version, make):
    python = make.python("other", version)
    done = make("install", f"PYTHON={python}", f"VENV={make.directory / 'new'}")
    refusal = f"error: PYTHON: {python} is Python {version}, expected >=3.10,<3.13; name another: make PYTHON=python3.11"
    assert done.returncode and done.stderr.splitlines()[0] == refusal
    assert (done.stdout, make.asked()) == ("", [])


@pytest.mark.parametrize("version", ["3.10.0", "3.12.9"])
def test_an_environment_is_made_anew_for_another_python(version, make):
    (make.venv / "pyvenv.cfg").touch()
    assert make("install", f"PYTHON={make.python('other', version)}").returncode == 0
    assert make.asked()[0] == f"-m|venv|--clear|{make.venv}|"
    assert {line.split("|")[1] for line in make.asked()[1:]} == {"pip"}


def test_a_directory_that_is_no_environment_is_not_cleared(make):
    make("install", f"PYTHON={make.python('other', '3.12.9')}")
    assert make.asked()[0] == f"-m|venv|{make.venv}|"


def test_an_environment_that_is_there_is_kept(make):
    """Whether PYTHON is not given, or is the same; also when it has to be installed into once more."""
    for variables in ((), (f"PYTHON={make.python('same', '3.11.7')}",)):
        assert (make("install", *variables).returncode, make.asked()) == (0, [])
    (make.venv / ".installed").unlink()
    assert make("install").returncode == 0
    assert make.asked()[0] == f"-m|venv|{make.venv}|"


@pytest.mark.parametrize("name", ["VENV", "PYTHON"])
@pytest.mark.parametrize("value", ["/my place/x", ""])
def test_paths_that_make_cannot_have_are_refused_in_one_line(name, value, make):
    done = make("install", f"{name}={value}")
    refusal = f'{name}: got "{value}", expected one path without spaces, which make takes for several; choose another'
    assert done.returncode and re.fullmatch(rf"Makefile:\d+: \*\*\* {re.escape(refusal)}\.  Stop\.\n", done.stderr)


# -- The tests for a GPU


def test_every_file_that_skips_without_a_gpu_is_run_on_one(make):
    skips = re.compile(r'(?:reason=|skip\()"needs [^"]*(?:CUDA|GPU|Hopper|H100)')
    files = {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py") if skips.search(path.read_text())}
    make("test-gpu")
    (line,) = make.asked()
    assert files == {word for word in line.split("|") if word.startswith("tests/")} >= {"tests/test_moe_hopper.py"}
