"""The sampler's kernels equal the plain sampler and its noise, in Triton's interpreter: see `vocabulary_kernel_cases.py`."""

from interpreter_runs import check_interpreted


def test_sampler_kernels_equal_the_plain_sampler():
    check_interpreted("vocabulary_kernel_cases.py")
