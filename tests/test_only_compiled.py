"""Launches that are compiled ahead and not made, on a machine without a GPU: the compiler is told of one."""

from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from hopper import HopperDriver  # noqa: E402
from triton.runtime import driver  # noqa: E402

from plugins.moe import alignment  # noqa: E402
from plugins.triton_launch import Launch, only_compiled  # noqa: E402

EXPERTS, TOP_K, TILE_ROWS = 128, 8, 32


class AbsentGpu(HopperDriver):
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(tmp_path, monkeypatch) -> Iterator[Path]:
    """Where compiled kernels are kept."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", AbsentGpu())
    for launch in launches():
        launch.kernel.device_caches.clear()
    yield tmp_path
    for launch in launches():
        launch.kernel.device_caches.clear()


def launches() -> list[Launch]:
    """The first two are of one kernel for the same arguments."""
    top_k_index = torch.zeros(256, TOP_K, dtype=torch.int64)
    twice = [alignment.align(top_k_index, EXPERTS, TILE_ROWS) for _ in range(2)]
    return [*twice, alignment.count(top_k_index, EXPERTS)]


def test_each_kernel_is_compiled_once_and_outputs_are_zeros(compiled):
    described = launches()
    for output in (output for launch in described for output in launch.outputs):
        output.fill_(7)
    with only_compiled():
        for launch in described:
            assert not any(output.any() for output in launch.run())
    assert sorted(file.name for file in compiled.rglob("*.cubin")) == ["align_kernel.cubin", "count_kernel.cubin"]


def test_what_cannot_be_compiled_fails_when_the_block_ends(compiled):
    launch = launches()[0]
    launch.constants["EXPERTS_POW2"] = 100

    def compiling() -> None:
        with only_compiled():
            launch.run()

    with pytest.raises(triton.CompilationError, match="power of 2"):
        copy_context().run(compiling)  # Triton's mode, if it fails, stays in its context
