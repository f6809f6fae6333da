"""The kernels of FP8 experts equal their references, in Triton's interpreter: see `moe_fp8_kernel_cases.py`."""

from pathlib import Path

from triton_interpreter import run_in_interpreter


def test_fp8_kernels_equal_their_references():
    run_in_interpreter(str(Path(__file__).with_name("moe_fp8_kernel_cases.py")))
