"""The second product of packed experts for Hopper equals its reference, as Python on the CPU: see `gluon_interpreter.py`. On a
Hopper GPU it gives the bits of Triton's kernel.

Memory that must not be read is NaN, or outside of a tensor: an error.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the kernel is written in Triton's Gluon")

from gluon_interpreter import InterpretedKernel
from tolerances import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

from plugins.moe import alignment, packed_launch
from plugins.moe.arranging import BLOCK
from plugins.moe.hopper_down_kernel import hopper_down_kernel
from plugins.moe.kernel_reference import align_reference, down_reference
from plugins.moe.packing import ROW_FACTOR, pack, packed_shape, unpack
from plugins.triton_launch import Launch

EXPERTS = 4

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread_an_operation")


@pytest.mark.parametrize("index_of", ["random", "one expert", "no expert"])
@pytest.mark.parametrize(
    ("hidden_size", "width"),
    [(256, 256), (192, 224), (64, 320), (2816, 704)],
    ids=["even", "one block more, columns filled up", "a block", "real"],
)
def test_equals_the_reference(hidden_size, width, index_of):
    rows, top_k = (150, 2) if hidden_size < 2816 else (20, 2)
    index = torch.rand(rows, EXPERTS).topk(top_k).indices
    if index_of == "one expert":
        index = torch.full((rows, 1), 2)
    elif index_of == "no expert":
        index[::3] = -1
    down = (torch.randn(EXPERTS, hidden_size, width) * width**-0.5).bfloat16()
    packed = pack(down)
    for expert in set(range(EXPERTS)) - set(index.unique().tolist()):
        packed[expert, :, -BLOCK:] = torch.tensor(float("nan")).view(torch.int32)
    activated = torch.randn(index.numel(), width).bfloat16()
    weights = torch.rand(index.shape)
    tile = packed_launch.hopper_tile(packed)
    slots, experts = align_reference(index, EXPERTS, tile.rows)
    unused = [torch.iinfo(torch.int32).max] * tile.rows
    routing = torch.tensor([*slots, *unused], dtype=torch.int32), torch.tensor([*experts, -1], dtype=torch.int32)
    operands = (activated * ROW_FACTOR, packed, weights, *routing, hidden_size)
    (weighted,) = packed_launch.down(*operands, tile, InterpretedKernel(hopper_down_kernel)).run()
    chosen = (index >= 0).flatten()
    expected = down_reference(activated, unpack(packed, hidden_size, width), weights, index.clamp(min=0))
    assert_close(weighted[chosen], expected[chosen], torch.bfloat16)
    assert weighted[~chosen].isnan().all()


@pytest.mark.parametrize(
    ("rows", "capability", "width", "expected"),
    [
        (2048, (9, 0), 704, "hopper_down_kernel"),
        (2048, (10, 0), 704, "down_packed_kernel"),
        (2048, (9, 0), 768, "down_packed_kernel"),
        (256, (9, 0), 704, "down_packed_kernel"),
    ],
    ids=["many rows", "another device", "rows too long for shared memory", "few rows"],
)
def test_which_kernel_is_launched(rows, capability, width, expected, monkeypatch):
    launched = []
    monkeypatch.setattr(Launch, "run", lambda self, wrap: launched.append(self.kernel.__name__) or self.outputs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode(), torch.device("cuda"):
        shapes = packed_shape((128, 2 * width, 2816), 2), packed_shape((128, 2816, width), 1)
        packed = [torch.empty(shape, dtype=torch.int32) for shape in shapes]
        weights = torch.empty(rows, 8)
        packed_launch.experts_packed(torch.empty(rows, 2816, dtype=torch.bfloat16), weights.long(), weights, *packed)
    assert launched[-2] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 2048, 5000])
@pytest.mark.parametrize(("hidden_size", "width"), [(2816, 704), (320, 224)])
def test_a_gpu_gives_the_bits_of_the_kernel_for_all(hidden_size, width, rows):
    """Of 128 experts, some without rows; and the operator takes it."""
    num_experts, top_k = 128, 8
    index = torch.rand(rows, num_experts - 5, device="cuda").topk(top_k).indices
    weights = torch.rand(rows, top_k, device="cuda")
    packed = pack(torch.randn(num_experts, hidden_size, width, device="cuda").bfloat16() * width**-0.5)
    activated = torch.randn(rows * top_k, width, device="cuda").bfloat16() * ROW_FACTOR
    tile = packed_launch.MANY_ROWS_DOWN
    if not packed_launch.has_hopper_kernel(activated, hidden_size, tile):
        pytest.skip("needs a GPU of compute capability 9.0")
    routing = alignment.align(index, num_experts, tile.rows).run()
    operands = (activated, packed, weights, *routing, hidden_size)
    (expected,) = packed_launch.down(*operands, tile).run()
    (weighted,) = packed_launch.down(*operands, packed_launch.hopper_tile(packed), hopper_down_kernel).run()
    assert weighted.isfinite().all()
    assert torch.equal(weighted, expected)
