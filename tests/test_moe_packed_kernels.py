"""The kernels of packed experts equal those of plain ones, in Triton's interpreter: see `moe_packed_kernel_cases.py`."""

from pathlib import Path

from triton_interpreter import run_in_interpreter


def test_packed_kernels_equal_the_plain_ones():
    run_in_interpreter(str(Path(__file__).with_name("moe_packed_kernel_cases.py")))
