"""The experts' second products for Hopper equal their reference, as Python on the CPU: see `gluon_interpreter.py`. On a Hopper
GPU they give the bits of Triton's kernels.

Memory that must not be read is NaN, or outside of a tensor: an error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton's Gluon")

from gluon_interpreter import InterpretedKernel
from nvfp4_weights import rounded_rows
from tolerances import assert_close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from plugins.moe import alignment, four_bit_launch, fp8_launch, packed_launch
from plugins.moe.arranged_launch import hopper_tile
from plugins.moe.arranging import BLOCK, arrange, arranged_shape
from plugins.moe.formats import dtype_in_format, shape_in_format
from plugins.moe.fp8 import FP8, from_fp8, to_fp8
from plugins.moe.hopper_down_fp8_kernel import hopper_down_fp8_kernel
from plugins.moe.hopper_down_kernel import (
    hopper_down_four_bit_kernel,
    hopper_down_packed_kernel,
    hopper_down_wide_kernel,
)
from plugins.moe.int4 import from_int4, to_int4
from plugins.moe.kernel_reference import align_reference, down_reference
from plugins.moe.kinds import experts
from plugins.moe.launch import Tile
from plugins.moe.nvfp4 import FACTOR_BYTES, numbers_of, to_nvfp4
from plugins.moe.packing import ROW_FACTOR, pack, unpack
from plugins.triton_launch import HOPPER_CAPABILITY, Launch

EXPERTS = 4

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Product:
    """A second product of rows and a weight in its format: what they stand for, and how it is launched."""

    rows: Tensor
    weight: Tensor
    launch: Callable[..., Launch]
    """With the rows' weights, the routing, a tile, and maybe a kernel."""
    exists: Callable[[Tile], bool]


def packed_product(activated: Tensor, weight: Tensor, unused: list[int]) -> Product:
    packed = pack(weight)
    packed[unused, :, -BLOCK:] = torch.tensor(float("nan"), device=packed.device).view(torch.int32)
    rows, hidden_size = activated * ROW_FACTOR, weight.shape[1]

    def launch(top_k_weights, routing, tile, kernel=None):
        how = (tile,) if kernel is None else (hopper_tile(packed, tile), kernel)
        return packed_launch.down(rows, packed, top_k_weights, *routing, hidden_size, *how)

    def exists(tile):
        return packed_launch.has_hopper_kernel(rows, hidden_size, tile)

    return Product(activated, unpack(packed, *weight.shape[1:]), launch, exists)


def four_bit_product(activated: Tensor, weight: Tensor, unused: list[int], *, stored: str) -> Product:
    if stored == "nvfp4":
        rows = rounded_rows(weight, factor=2.0**-9)
        numbers = to_nvfp4(rows)
        numbers[unused, :, -FACTOR_BYTES * BLOCK :] = 0xFF  # NaN
        stands_for = from_fp8(*numbers_of(rows)).bfloat16()
    else:
        numbers = to_int4(weight)
        stands_for = from_int4(numbers, *weight.shape[1:])
    hidden_size = weight.shape[1]

    def launch(top_k_weights, routing, tile, kernel=None):
        if kernel is None:
            return packed_launch.down(activated, numbers, top_k_weights, *routing, hidden_size, tile)
        words = numbers.view(torch.int32)
        return packed_launch.down(activated, words, top_k_weights, *routing, hidden_size, hopper_tile(words, tile), kernel)

    def exists(tile):
        return packed_launch.has_hopper_kernel(activated, hidden_size, tile)

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
    "packed": (packed_product, hopper_down_packed_kernel),
    "int4": (partial(four_bit_product, stored="int4"), hopper_down_four_bit_kernel),
    "nvfp4": (partial(four_bit_product, stored="nvfp4"), hopper_down_four_bit_kernel),
    "FP8": (partial(fp8_product, fp8_rows=True), hopper_down_fp8_kernel),
    "FP8 weights": (partial(fp8_product, fp8_rows=False), hopper_down_wide_kernel),
}
TILES = {
    "packed": [packed_launch.MANY_ROWS],
    "int4": [four_bit_launch.MANY_ROWS],
    "nvfp4": [four_bit_launch.MANY_ROWS],
    "FP8": [fp8_launch.SOME_FP8_ROWS, fp8_launch.MANY_FP8_ROWS],
    "FP8 weights": [fp8_launch.MANY_ROWS],
}
SIZES = {
    "packed": [(256, 320), (192, 352), (64, 384)],
    "int4": [(256, 384), (192, 416), (64, 448)],
    "nvfp4": [(256, 384), (192, 416), (64, 448)],
    "FP8": [(256, 256), (192, 224), (64, 320), (128, 144)],
    "FP8 weights": [(256, 320), (192, 376), (64, 328)],
}
CASES = [(kind, tile, *sizes) for kind, tiles in TILES.items() for tile in tiles for sizes in (*SIZES[kind], (2816, 704))]


@pytest.mark.parametrize("index_of", ["random", "one expert", "no expert"])
@pytest.mark.parametrize(("kind", "tile", "hidden_size", "width"), CASES)
def test_equals_the_reference(kind, tile, hidden_size, width, index_of):
    """Blocks in even and odd numbers, or one; columns filled up; steps whole and half."""
    rows, top_k = (150, 2) if hidden_size < 2816 else (20, 2)
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


@pytest.mark.parametrize(
    ("kind", "rows", "capability", "width", "expected"),
    [
        ("packed", 2048, (9, 0), 704, "hopper_down_packed_kernel"),
        ("packed", 2048, (10, 0), 704, "down_packed_kernel"),
        ("packed", 2048, (9, 0), 768, "down_packed_kernel"),
        ("packed", 512, (9, 0), 704, "down_packed_kernel"),
        ("int4", 2048, (9, 0), 704, "hopper_down_four_bit_kernel"),
        ("int4", 2048, (10, 0), 704, "down_packed_kernel"),
        ("nvfp4", 2048, (9, 0), 704, "hopper_down_four_bit_kernel"),
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
    assert launched[-2] == expected


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != HOPPER_CAPABILITY, reason="needs a Hopper device"
)
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
