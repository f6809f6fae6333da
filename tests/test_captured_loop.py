"""The captured loop's steps equal the plain loop's, uncaptured and in Triton's interpreter: see `captured_loop_cases.py`."""

import pytest
from interpreter_runs import check_interpreted


def test_captured_steps_equal_plain_steps():
    check_interpreted("captured_loop_cases.py")


@pytest.mark.parametrize(
    ("max_sequences", "expected"), [(1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (64, (1, 2, 4, 8, 16, 32, 64))]
)
def test_buckets(max_sequences, expected):
    pytest.importorskip("triton", reason="the loop's kernels are written in Triton's language")
    from backend.captured_step import buckets

    assert buckets(max_sequences) == expected
