"""The attention kernels equal their references, in Triton's interpreter: see `attention_kernel_cases.py`."""

from pathlib import Path

from triton_interpreter import run_in_interpreter


def test_attention_kernels_equal_their_references():
    run_in_interpreter(str(Path(__file__).with_name("attention_kernel_cases.py")))
