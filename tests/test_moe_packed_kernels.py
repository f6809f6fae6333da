"""The kernels of packed experts equal those of plain ones, in Triton's interpreter: see `moe_packed_kernel_cases.py`."""

from interpreter_runs import check_interpreted


def test_packed_kernels_equal_the_plain_ones():
    check_interpreted("moe_packed_kernel_cases.py")
