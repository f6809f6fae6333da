"""Every kernel of the mixture of experts equals its reference, in Triton's interpreter: see `moe_kernel_cases.py`."""

from interpreter_runs import check_interpreted


def test_moe_kernels_equal_their_references():
    check_interpreted("moe_kernel_cases.py")
