"""The kernels around the products of a layer equal their references, in Triton's interpreter: see `layer_kernel_cases.py`."""

from pathlib import Path

from triton_interpreter import run_in_interpreter


def test_layer_kernels_equal_their_references():
    run_in_interpreter(str(Path(__file__).with_name("layer_kernel_cases.py")))
