"""The sampler's kernels equal the plain sampler and its noise, in Triton's interpreter: see `vocabulary_kernel_cases.py`."""

from pathlib import Path

from triton_interpreter import run_in_interpreter


def test_sampler_kernels_equal_the_plain_sampler():
    run_in_interpreter(str(Path(__file__).with_name("vocabulary_kernel_cases.py")))
