"""Fixtures shared by all tests."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from small_checkpoints import TINY
from transformers import AutoTokenizer

from builder.build import build_engine

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(TINY.parent))

from tiny_tasks import TASKS, Question, questions  # noqa: E402


@pytest.fixture(scope="session")
def engine_dir() -> Path:
    """The tiny checkpoint's engine, compiled; kept between runs and built again only when something it depends on changed."""
    engine = ROOT / "engines" / "tests"
    build_engine(TINY, engine, target="inductor", dtype="float32", device="cpu")
    return engine


@pytest.fixture(scope="session")
def chat_tokenizer():
    """The tiny checkpoint's tokenizer as transformers loads it, with its chat template."""
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
def one_thread_an_operation():
    """For tests that have threads of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory():
    """PyTorch's deterministic mode fills new tensors with NaN, or the largest integer: what kernels write, and scratch."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
