"""Every kernel of the mixture of experts equals its reference, in Triton's interpreter: see `moe_kernel_cases.py`."""

from pathlib import Path

from triton_interpreter import run_in_interpreter


def test_moe_kernels_equal_their_references():
    run_in_interpreter(str(Path(__file__).with_name("moe_kernel_cases.py")))
