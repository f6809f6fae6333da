"""The kernels of FP8 experts equal their references, in Triton's interpreter: see `moe_fp8_kernel_cases.py`."""

from interpreter_runs import check_interpreted


def test_fp8_kernels_equal_their_references():
    check_interpreted("moe_fp8_kernel_cases.py")
