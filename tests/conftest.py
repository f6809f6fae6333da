"""Fixtures shared by all tests."""

import itertools
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from interpreter_runs import InterpreterRuns

# Of all that the tests start, too. Several processes run at once, and threads of an operation wait for each other by spinning:
# on two busy cores a small operation takes five times as long with two threads.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

ROOT = Path(__file__).parent.parent
TINY = ROOT / "checkpoints" / "tiny"
sys.path.insert(0, str(TINY.parent))

from tiny_tasks import TASKS, Question, questions  # noqa: E402

_RUNS = pytest.StashKey[InterpreterRuns]()


def pytest_collection_finish(session):
    marks = [mark for item in session.items for mark in item.iter_markers("interpreted")]
    if find_spec("triton") and not session.config.option.collectonly:
        session.config.stash[_RUNS] = InterpreterRuns(dict.fromkeys(mark.args[0] for mark in marks))


def pytest_sessionfinish(session):
    if runs := session.config.stash.get(_RUNS, None):
        runs.stop()


@pytest.fixture
def check_interpreted(request) -> Callable[[], None]:
    """Fails if a case that the test's mark names has failed."""
    pytest.importorskip("triton", reason="the kernels are written in Triton's language")
    mark = request.node.get_closest_marker("interpreted")
    return partial(request.config.stash[_RUNS].check, *mark.args)


@pytest.fixture(scope="session")
def engine_dir() -> Path:
    """The tiny checkpoint's engine, compiled; kept between runs and built again only when something it depends on changed."""
    from builder.build import build_engine  # only here, as below: runs of interpreted cases would import it for nothing

    engine = ROOT / "engines" / "tests"
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
def two_threads_an_operation():
    """For tests of what divides its work among threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory():
    """PyTorch's deterministic mode fills new tensors with NaN, or the largest integer: what kernels write, and scratch."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
