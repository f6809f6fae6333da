"""Fixtures shared by all tests, their order, and the threads of an operation."""

import fcntl
import itertools
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# Of all that the tests start, too. Several processes run at once, and threads of an operation wait for each other by spinning:
# on two busy cores a small operation takes five times as long with two threads.
os.environ["OMP_NUM_THREADS"] = "1"
# Containers like to forbid Python to keep what it compiled: each process would compile PyTorch again, for up to 8 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
TINY = ROOT / "checkpoints" / "tiny"
sys.path.insert(0, str(TINY.parent))

from tiny_tasks import TASKS, Question, questions  # noqa: E402


def pytest_collection_modifyitems(items):
    """First a file that wants the engine, then those that do not, then the others: of two processes one compiles the engine,
    which takes minutes of one core, and the other need not wait for it."""
    wanting = sorted({item.path for item in items if "engine_dir" in item.fixturenames})
    items.sort(key=lambda item: (item.path not in wanting[:1], item.path in wanting))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """File by file, but one process for those that share the programs of `onnx_once`, which take half a minute."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return re.sub("test_onnx|test_tensorrt_session", "test_tensorrt_target", file)

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def engine_dir() -> Path:
    """The tiny checkpoint's engine, compiled; kept between runs and built again only when something it depends on changed."""
    from builder.build import build_engine  # only here, as below: runs of interpreted cases would import it for nothing

    engine = ROOT / "engines" / "tests"
    engine.parent.mkdir(exist_ok=True)
    with (engine.parent / "tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of these tests may be building it
        build_engine(TINY, engine, target="inductor", dtype="float32", device="cpu")
    return engine


@pytest.fixture(scope="session")
def chat_tokenizer():
    """The tiny checkpoint's tokenizer as transformers loads it, with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="session")
def render(chat_tokenizer):
    """A question of `tiny_tasks` → its prompt, as the chat template writes it."""

    def rendered(question: Question) -> str:
        return chat_tokenizer.apply_chat_template(
            question.messages,
            tools=question.tools,
            enable_thinking=question.enable_thinking,
            add_generation_prompt=True,
            tokenize=False,
        )

    return rendered


@pytest.fixture(scope="session")
def held_out() -> list[Question]:
    """Two held-out questions of every task."""
    return [question for task in TASKS for question in itertools.islice(questions(11, held_out=True, tasks=(task,)), 2)]


@pytest.fixture
def uncompiled(monkeypatch):
    """Builds for `inductor` trace their programs, and in place of compiling one write its name."""
    from builder.targets.compiled import Compiled

    def compile_program(program, directory):
        (directory / f"{program.name}.pt2").write_text(program.name)
        return Compiled(file=f"{program.name}.pt2")

    def compile_operators(directory):
        (directory / "operators.so").write_text("operators")
        return "operators.so"

    monkeypatch.setattr("builder.compiling.processes", ThreadPoolExecutor)  # another process would compile in earnest
    monkeypatch.setattr("builder.compiling.compiler", lambda build, model: compile_program)
    monkeypatch.setattr("builder.build.compile_operators", compile_operators)


@pytest.fixture
def two_threads_an_operation():
    """For tests of what divides its work among threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory():
    """PyTorch's deterministic mode fills new tensors with NaN, or the largest integer: what kernels write, and scratch."""
    torch.manual_seed(0)
    torch.set_deterministic_debug_mode("error")  # as `use_deterministic_algorithms`, which imports the compiler, for 3 s
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.set_deterministic_debug_mode("default")
