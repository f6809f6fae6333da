"""The kernels of packed experts equal those of plain ones, in Triton's interpreter: see `moe_packed_kernel_cases.py`."""

import pytest


@pytest.mark.interpreted("moe_packed_kernel_cases.py")
def test_packed_kernels_equal_the_plain_ones(check_interpreted):
    check_interpreted()
