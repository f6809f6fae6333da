"""The attention kernels equal their references, in Triton's interpreter: see `attention_kernel_cases.py`."""

import pytest


@pytest.mark.interpreted("attention_kernel_cases.py")
def test_attention_kernels_equal_their_references(check_interpreted):
    check_interpreted()
