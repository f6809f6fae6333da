"""The kernels around the products of a layer equal their references, in Triton's interpreter: see `layer_kernel_cases.py`."""

import pytest


@pytest.mark.interpreted("layer_kernel_cases.py")
def test_layer_kernels_equal_their_references(check_interpreted):
    check_interpreted()
