"""The attention kernels equal their references, in Triton's interpreter: see `attention_kernel_cases.py`."""

from interpreter_runs import check_interpreted


def test_attention_kernels_equal_their_references():
    check_interpreted("attention_kernel_cases.py")
