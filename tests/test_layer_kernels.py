"""The kernels around the products of a layer equal their references, in Triton's interpreter: see `layer_kernel_cases.py`."""

from interpreter_runs import check_interpreted


def test_layer_kernels_equal_their_references():
    check_interpreted("layer_kernel_cases.py")
