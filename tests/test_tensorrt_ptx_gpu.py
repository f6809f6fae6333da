"""The plugins' PTX on a Hopper GPU, launched as TensorRT launches it: through the CUDA driver, with the declared arguments and
nothing else. Needs no TensorRT."""

import ctypes

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from test_plugins import attention_inputs
from tolerances import assert_close

from plugins.attention.reference import paged_attention_reference
from plugins.attention.tensorrt import PAGED_ATTENTION
from plugins.moe import launch as moe
from plugins.moe.tensorrt import ALIGN, COMBINE, DOWN, GATE_UP, tile_attributes
from plugins.plugin_ptx import compile_for_plugin
from plugins.tensorrt_plugin import KernelPlugin

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an H100 or H200"
)

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_…, cuda.h


def launched(plugin: KernelPlugin, inputs: tuple[torch.Tensor, ...], **attributes: int) -> tuple[torch.Tensor, ...]:
    """The plugin's outputs, from its PTX."""
    launch = plugin.describe(inputs, **attributes)
    kernel = compile_for_plugin(launch)
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments) -> None:
        status = getattr(driver, name)(*arguments)
        assert status == 0, f"{name}: CUDA error {status}"

    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(module), kernel.ptx.encode())
    call("cuModuleGetFunction", ctypes.byref(function), module, kernel.name.encode())
    call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared_bytes)
    pointers = [[ctypes.c_uint64(tensor.data_ptr()) for tensor in tensors] for tensors in (inputs, launch.outputs)]
    values = [*pointers[0], *map(ctypes.c_int32, launch.scalars), *pointers[1]]
    # One place more than there are arguments, which a kernel with a hidden argument would read, and fail on.
    arguments = (ctypes.c_void_p * (len(values) + 1))(*(ctypes.addressof(value) for value in values), None)
    grid = (*launch.grid, 1, 1)[:3]
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    call("cuLaunchKernel", function, *grid, kernel.num_threads, 1, 1, kernel.shared_bytes, stream, arguments, None)
    torch.cuda.synchronize()
    call("cuModuleUnload", module)
    return launch.outputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [0, 1], ids=["denoise", "encode"])
@pytest.mark.parametrize(
    "sizes",
    [{"kv_heads": 8, "head_dim": 256, "window": 1024}, {"kv_heads": 2, "head_dim": 512, "window": 0}],
    ids=["sliding", "full"],
)
def test_attention(sizes, causal, dtype):
    inputs = attention_inputs(
        prefixes=[1500, 0, 257], counts=[256, 63, 1], heads=16, page_size=32, dtype=dtype, images=bool(causal), **sizes
    )
    expected = paged_attention_reference(*inputs, bool(causal), sizes["window"])
    (output,) = launched(PAGED_ATTENTION, tuple(each.cuda() for each in inputs), causal=causal, window=sizes["window"])
    assert_close(output.cpu(), expected, dtype)


@pytest.mark.parametrize("rows", [1, 63, 257])
@pytest.mark.parametrize("tile", [moe.FEW_ROWS, moe.MANY_ROWS], ids=["few rows", "many rows"])
def test_experts(tile, rows):
    torch.manual_seed(0)
    hidden = torch.randn(rows, 2816, device="cuda", dtype=torch.bfloat16)
    gate_up_proj = torch.randn(128, 1408, 2816, device="cuda", dtype=torch.bfloat16) * 2816**-0.5
    down_proj = torch.randn(128, 2816, 704, device="cuda", dtype=torch.bfloat16) * 704**-0.5
    index = torch.rand(rows, 128, device="cuda").topk(8).indices
    weights = torch.rand(rows, 8, device="cuda")
    sizes = tile_attributes(tile)
    order = launched(ALIGN, (index,), num_experts=128, rows=tile.rows)
    (activated,) = launched(GATE_UP, (hidden, gate_up_proj, *order), top_k=8, **sizes)
    (weighted,) = launched(DOWN, (activated, down_proj, weights, *order), **tile_attributes(moe.choose_down_tile(tile)))
    (output,) = launched(COMBINE, (weighted,), top_k=8)
    assert torch.equal(output, moe.experts(hidden, index, weights, gate_up_proj, down_proj, tile=tile))
