"""The experts' products for Hopper equal their reference, as Python on the CPU: see `gluon_interpreter.py`. On a Hopper
GPU they give the bits of Triton's kernels.

Memory that must not be read is NaN, or outside of a tensor: an error.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton's Gluon")

from gluon_interpreter import InterpretedKernel
from nvfp4_weights import rounded_rows
from tolerances import assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from plugins import triton_launch
from plugins.moe import alignment, fp8_launch, packed_launch
from plugins.moe.arranged_launch import hopper_tile
from plugins.moe.arranging import BLOCK, arrange, arranged_shape
from plugins.moe.formats import dtype_in_format, shape_in_format
from plugins.moe.fp8 import FP8, from_fp8, to_fp8
from plugins.moe.hopper_down_fp8_kernel import hopper_down_fp8_kernel
from plugins.moe.hopper_down_kernel import hopper_down_packed_kernel, hopper_down_wide_kernel
from plugins.moe.int4 import from_int4, to_int4
from plugins.moe.kernel_reference import align_reference, down_reference, gate_up_reference
from plugins.moe.kinds import experts
from plugins.moe.launch import Tile
from plugins.moe.nvfp4 import numbers_of, to_nvfp4
from plugins.moe.packed_launch import MANY_ROWS
from plugins.moe.packing import ROW_FACTOR, pack, unpack
from plugins.triton_launch import HOPPER_CAPABILITY, Launch

EXPERTS = 4
FACTORS = {"packed": ROW_FACTOR, "int4": 1.0, "nvfp4": 1.0}
"""Formats of bfloat16 numbers, and what their rows are times."""

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Product:
    """A second product of rows and a weight in its format: what they stand for, and how it is launched."""

    rows: Tensor
    weight: Tensor
    launch: Callable[..., Launch]
    """With the rows' weights, the routing, a tile, and maybe a kernel."""
    exists: Callable[[Tile], bool]


def formed(weight: Tensor, stored: str, halves: int, unused: list[int]) -> tuple[Tensor, Tensor]:
    """A bfloat16 weight in a format, with NaN for the scales of unused experts, and the bfloat16 numbers that it stands for."""
    if stored == "nvfp4":
        rows = rounded_rows(weight, factor=2.0**-9)
        own, stands_for = to_nvfp4(rows, halves), from_fp8(*numbers_of(rows)).bfloat16()
    else:
        make, read = (to_int4, from_int4) if stored == "int4" else (pack, unpack)
        own = make(weight, halves)
        stands_for = read(own, *weight.shape[1:], halves)
    if stored != "int4":
        own.view(torch.int32)[unused, :, -BLOCK:] = torch.tensor(float("nan"), device=own.device).view(torch.int32)
    return own, stands_for


def bfloat16_product(activated: Tensor, weight: Tensor, unused: list[int], *, stored: str) -> Product:
    own, stands_for = formed(weight, stored, 1, unused)
    rows, hidden_size = activated * FACTORS[stored], weight.shape[1]

    def launch(top_k_weights, routing, tile, kernel=None):
        operands = (rows, own, top_k_weights, *routing, hidden_size, tile)
        if kernel is None:
            return packed_launch.down(*operands)
        return replace(packed_launch.hopper_down(*operands), kernel=kernel)

    def exists(tile):
        return packed_launch.has_hopper_down(rows, hidden_size, tile)

    return Product(activated, stands_for, launch, exists)


def fp8_product(activated: Tensor, weight: Tensor, unused: list[int], *, fp8_rows: bool) -> Product:
    (numbers, scale), (rows, row_scale) = to_fp8(weight), to_fp8(activated)
    if not fp8_rows:
        rows = (activated.float() / row_scale[:, None]).half()
    stands_for = from_fp8(numbers, scale)
    scale[unused] = float("nan")
    arranged = arrange(numbers, 1, narrow=fp8_rows)

    def launch(top_k_weights, routing, tile, kernel=None):
        others = (scale, top_k_weights, *routing)
        if kernel is None:
            return fp8_launch.down(rows, row_scale, arranged, *others, tile, activated.dtype)
        words = arranged.view(torch.int32)
        return fp8_launch.down(rows, row_scale, words, *others, hopper_tile(words, tile), activated.dtype, kernel)

    def exists(tile):
        return fp8_launch.hopper_kernel(rows, weight.shape[1], tile) is not None

    return Product(from_fp8(rows, row_scale).to(activated.dtype), stands_for, launch, exists)


PRODUCTS = {
    **{stored: (partial(bfloat16_product, stored=stored), hopper_down_packed_kernel) for stored in FACTORS},
    "FP8": (partial(fp8_product, fp8_rows=True), hopper_down_fp8_kernel),
    "FP8 weights": (partial(fp8_product, fp8_rows=False), hopper_down_wide_kernel),
}
TILES = {
    **{stored: [packed_launch.MANY_ROWS] for stored in FACTORS},
    "FP8": [fp8_launch.SOME_FP8_ROWS, fp8_launch.MANY_FP8_ROWS],
    "FP8 weights": [fp8_launch.MANY_ROWS],
}
SIZES = {
    **{stored: [(256, 384), (192, 416), (64, 512)] for stored in FACTORS},
    "FP8": [(256, 256), (192, 224), (64, 320), (128, 144)],
    "FP8 weights": [(256, 320), (192, 376), (64, 328)],
}
# The last one has the 26B model's width; its 2816 columns would be the same programs seven times more.
CASES = [(kind, tile, *sizes) for kind, tiles in TILES.items() for tile in tiles for sizes in (*SIZES[kind], (384, 704))]


@pytest.mark.parametrize("index_of", ["random", "one expert", "no expert"])
@pytest.mark.parametrize(("kind", "tile", "hidden_size", "width"), CASES)
def test_equals_the_reference(kind, tile, hidden_size, width, index_of):
    """Blocks in even and odd numbers, or one; columns filled up; steps whole and half."""
    rows, top_k = (150, 2) if width < 704 else (20, 2)
    index = torch.rand(rows, EXPERTS).topk(top_k).indices
    if index_of == "one expert":
        index = torch.full((rows, 1), 2)
    elif index_of == "no expert":
        index[::3] = -1
    make, kernel = PRODUCTS[kind]
    weight = (torch.randn(EXPERTS, hidden_size, width) * width**-0.5).bfloat16()
    unused = sorted(set(range(EXPERTS)) - set(index.unique().tolist()))
    product = make(torch.randn(index.numel(), width).bfloat16(), weight, unused)
    weights = torch.rand(index.shape)
    slots, experts = align_reference(index, EXPERTS, tile.rows)
    no_rows = [torch.iinfo(torch.int32).max] * tile.rows
    routing = torch.tensor([*slots, *no_rows], dtype=torch.int32), torch.tensor([*experts, -1], dtype=torch.int32)
    (weighted,) = product.launch(weights, routing, tile, InterpretedKernel(kernel)).run()
    chosen = (index >= 0).flatten()
    expected = down_reference(product.rows, product.weight, weights, index.clamp(min=0))
    assert_close(weighted[chosen], expected[chosen], torch.bfloat16)
    assert weighted[~chosen].isnan().all()


@pytest.mark.parametrize("index_of", ["random", "one expert", "no expert", "none at all"])
@pytest.mark.parametrize(("hidden_size", "width"), [(128, 64), (384, 128), (256, 192)])
@pytest.mark.parametrize("stored", FACTORS)
def test_the_first_product_equals_the_reference(stored, hidden_size, width, index_of, monkeypatch):
    """Parts with blocks for one group and for both; programs with many parts, and with none."""
    monkeypatch.setattr(triton_launch, "HOPPER_MULTIPROCESSORS", 3)
    index = torch.rand(150, EXPERTS).topk(2).indices
    if index_of == "one expert":
        index = torch.full((150, 1), 2)
    elif index_of == "no expert":
        index[::3] = -1
    elif index_of == "none at all":
        index[:] = -1
    weight = (torch.randn(EXPERTS, 2 * width, hidden_size) * hidden_size**-0.5).bfloat16()
    unused = sorted(set(range(EXPERTS)) - set(index.unique().tolist()))
    own, stands_for = formed(weight, stored, 2, unused)
    hidden = torch.randn(len(index), hidden_size).bfloat16()
    slots, experts = align_reference(index, EXPERTS, MANY_ROWS.rows)
    no_rows = [torch.iinfo(torch.int32).max] * MANY_ROWS.rows
    routing = torch.tensor([*slots, *no_rows], dtype=torch.int32), torch.tensor([*experts, -1], dtype=torch.int32)
    factor, top_k = FACTORS[stored], index.shape[1]
    described = packed_launch.hopper_gate_up(hidden * factor, own, *routing, top_k, MANY_ROWS, factor)
    assert described.grid == (3,)
    (activated,) = replace(described, kernel=InterpretedKernel(described.kernel)).run()
    chosen = (index >= 0).flatten()
    if chosen.any():
        expected = gate_up_reference(hidden, stands_for, index.clamp(min=0))
        assert_close(activated[chosen] / factor, expected[chosen], torch.bfloat16)
    assert activated[~chosen].isnan().all()


@pytest.mark.parametrize(
    ("kind", "rows", "capability", "width", "expected"),
    [
        ("packed", 16384, (9, 0), 704, "hopper_gate_up_packed_kernel, hopper_down_packed_kernel"),
        ("nvfp4", 16384, (9, 0), 768, "hopper_gate_up_packed_kernel, down_packed_kernel"),
        ("int4", 16384, (10, 0), 704, "gate_up_packed_kernel, down_packed_kernel"),
        ("packed", 2048, (9, 0), 704, "gate_up_packed_kernel, hopper_down_packed_kernel"),
        ("packed", 2048, (10, 0), 704, "down_packed_kernel"),
        ("packed", 2048, (9, 0), 768, "down_packed_kernel"),
        ("packed", 512, (9, 0), 704, "down_packed_kernel"),
        ("int4", 2048, (9, 0), 704, "hopper_down_packed_kernel"),
        ("int4", 2048, (10, 0), 704, "down_packed_kernel"),
        ("nvfp4", 2048, (9, 0), 704, "hopper_down_packed_kernel"),
        ("nvfp4", 1024, (9, 0), 704, "down_packed_kernel"),
        ("FP8", 512, (9, 0), 704, "hopper_down_fp8_kernel"),
        ("FP8", 2048, (9, 0), 768, "hopper_down_fp8_kernel"),
        ("FP8", 2048, (10, 0), 704, "down_fp8_kernel"),
        ("FP8", 2048, (9, 0), 832, "down_fp8_kernel"),
        ("FP8", 2048, (9, 0), 712, "down_fp8_kernel"),
        ("FP8", 256, (9, 0), 704, "down_fp8_kernel"),
        ("FP8 weights", 2048, (9, 0), 704, "hopper_down_wide_kernel"),
        ("FP8 weights", 2048, (9, 0), 700, "down_fp8_kernel"),
        ("FP8 weights", 2048, (9, 0), 768, "down_fp8_kernel"),
        ("FP8 weights", 1024, (9, 0), 704, "down_fp8_kernel"),
    ],
)
def test_which_kernel_is_launched(kind, rows, capability, width, expected, monkeypatch):
    """Devices, rows too long for shared memory or not of whole 16 bytes, few rows."""
    launched = []
    monkeypatch.setattr(Launch, "run", lambda self, wrap: launched.append(self.kernel.__name__) or self.outputs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode(), torch.device("cuda"):
        shapes = (128, 2 * width, 2816), (128, 2816, width)
        weights = torch.empty(rows, 8)
        operands = torch.empty(rows, 2816, dtype=torch.bfloat16), weights.long(), weights
        if kind in ("packed", "int4", "nvfp4"):
            dtype = getattr(torch, dtype_in_format(kind))
            experts(*operands, *(torch.empty(shape_in_format(shapes[i], kind, 2 - i), dtype=dtype) for i in range(2)))
        else:
            numbers = [torch.empty(arranged_shape(shapes[i], 2 - i), dtype=FP8) for i in range(2)]
            scales = [torch.empty(shape[:2]) for shape in shapes]
            fp8_launch.experts_fp8(*operands, numbers[0], scales[0], numbers[1], scales[1], kind == "FP8")
    assert launched[-2] == expected or ", ".join(launched[-3:-1]) == expected


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER_CAPABILITY, reason="needs a Hopper device"
)


@needs_hopper
@pytest.mark.parametrize("rows", [1, 2048, 9000])
@pytest.mark.parametrize(("hidden_size", "width"), [(2816, 704), (384, 192)])
@pytest.mark.parametrize("stored", FACTORS)
def test_a_gpu_gives_the_bits_of_the_first_product_for_all(stored, hidden_size, width, rows):
    num_experts, top_k, factor = 128, 8, FACTORS[stored]
    index = torch.rand(rows, num_experts - 5, device="cuda").topk(top_k).indices
    weight = torch.randn(num_experts, 2 * width, hidden_size, device="cuda").bfloat16() * hidden_size**-0.5
    own, _ = formed(weight, stored, 2, [])
    hidden = torch.randn(rows, hidden_size, device="cuda").bfloat16() * factor
    assert packed_launch.has_hopper_gate_up(hidden, own, top_k, MANY_ROWS, own.shape[0]) == (rows == 9000)
    routing = alignment.align(index, num_experts, MANY_ROWS.rows).run()
    (expected,) = packed_launch.gate_up(hidden, own, *routing, top_k, MANY_ROWS, factor).run()
    (activated,) = packed_launch.hopper_gate_up(hidden, own, *routing, top_k, MANY_ROWS, factor).run()
    assert activated.isfinite().all()
    assert torch.equal(activated, expected)


@needs_hopper
@pytest.mark.parametrize("rows", [1, 2048, 5000])
@pytest.mark.parametrize(("hidden_size", "width"), [(2816, 704), (320, 352)])
@pytest.mark.parametrize(("kind", "tile"), [(kind, tile) for kind, tiles in TILES.items() for tile in tiles])
def test_a_gpu_gives_the_bits_of_the_kernel_for_all(kind, tile, hidden_size, width, rows):
    """Of 128 experts, some without rows; and the operator takes it."""
    num_experts, top_k = 128, 8
    index = torch.rand(rows, num_experts - 5, device="cuda").topk(top_k).indices
    weights = torch.rand(rows, top_k, device="cuda")
    make, kernel = PRODUCTS[kind]
    weight = torch.randn(num_experts, hidden_size, width, device="cuda").bfloat16() * width**-0.5
    product = make(torch.randn(rows * top_k, width, device="cuda").bfloat16(), weight, [])
    assert product.exists(tile)
    routing = alignment.align(index, num_experts, tile.rows).run()
    (expected,) = product.launch(weights, routing, tile).run()
    (weighted,) = product.launch(weights, routing, tile, kernel).run()
    assert weighted.isfinite().all()
    assert torch.equal(weighted, expected)
