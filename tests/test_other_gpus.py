"""The kernels that take most shared memory, attention and the experts' products of many rows, compile for GPUs that have less
than Hopper, on a machine without a GPU."""

import pytest

triton = pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from test_attention_sm90 import LAYERS, attention_inputs  # noqa: E402
from test_moe_packed_sm90 import launches  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from plugins.attention import launch as attention  # noqa: E402
from plugins.moe import packed_launch  # noqa: E402

KB = 1024
SHARED_BYTES = {80: 163 * KB, 89: 99 * KB, 120: 99 * KB}
"""By compute capability, of one thread block (CUDA C++ programming guide): A100; RTX 40, L4 and L40; RTX 50."""


@pytest.fixture(params=SHARED_BYTES, ids=lambda capability: f"sm_{capability}")
def gpu(request, monkeypatch) -> int:
    for module in (attention, packed_launch):
        monkeypatch.setattr(module, "shared_bytes", lambda tensor: SHARED_BYTES[request.param])
    return request.param


def check_fits(launch, capability: int) -> None:
    compiled = launch.compile(GPUTarget("cuda", capability, 32))
    print(f"\nsm_{capability}: {launch.kernel.__name__}, shared {compiled.metadata.shared} bytes")
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    assert "mma.sync" in compiled.asm["ptx"]


@pytest.mark.parametrize("layer", LAYERS)
def test_attention_fits(layer, gpu):
    sizes = dict(LAYERS[layer])
    window = sizes.pop("window")
    inputs = attention_inputs(**sizes)
    check_fits(attention.attention_launch(inputs, True, window), gpu)
    check_fits(attention.split_launch(inputs, False, window, 4), gpu)


@pytest.mark.parametrize("stored", ["packed", "int4", "nvfp4"])
@pytest.mark.parametrize("product", ["gate_up", "down"])
def test_experts_fit(product, stored, gpu):
    check_fits(launches(16384, stored)[product], gpu)
