"""Every kernel of the mixture of experts equals its reference, in Triton's interpreter: see `moe_kernel_cases.py`."""

import pytest


@pytest.mark.interpreted("moe_kernel_cases.py")
def test_moe_kernels_equal_their_references(check_interpreted):
    check_interpreted()
