"""The TensorRT plugins, through TensorRT's own Python checks and without its libraries.

Each is registered, built and asked for its launch as TensorRT does it, with sizes that vary; what it answers is compared with
the kernel's own launch at concrete sizes.
"""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="the kernels are written in Triton's language")

import tensorrt_validators as validators  # noqa: E402
from hopper import HOPPER_SHARED_BYTES, MAX_REGISTERS, resources  # noqa: E402

from plugins.attention.tensorrt import PAGED_ATTENTION  # noqa: E402
from plugins.moe import alignment  # noqa: E402
from plugins.moe import launch as moe  # noqa: E402
from plugins.moe.tensorrt import ALIGN, COMBINE, DOWN, EXPERTS, GATE_UP, tile_attributes  # noqa: E402
from plugins.plugin_ptx import compile_for_plugin, plugin_ptx  # noqa: E402
from plugins.symbolic_launch import Operand  # noqa: E402
from plugins.tensorrt_plugin import NAMESPACE, KernelPlugin, Output, register  # noqa: E402
from plugins.triton_launch import Launch  # noqa: E402

HIDDEN, WIDTH, EXPERTS_COUNT, TOP_K, HEADS, PAGE_SIZE = 2816, 704, 128, 8, 16, 32
LAYERS = {"sliding": (8, 256, 1024), "full": (2, 512, 0)}
DTYPES = {torch.bfloat16: "BF16", torch.float32: "FLOAT", torch.int32: "INT32", torch.int64: "INT64"}
PTX_TYPES = {"u64": "pointer", "u32": "i32"}


@pytest.fixture(scope="module")
def tensorrt():
    trt, trtp = validators.load()
    register((PAGED_ATTENTION, *EXPERTS), trt, trtp)
    return trt, trtp


def attention_shapes(layer: str, tokens: int = -1, sequences: int = -1, pages: int = -1, columns: int = -1, starts: int = -1):
    heads, head_dim, _ = LAYERS[layer]
    return [
        (tokens, HEADS, head_dim),
        (tokens, 2, heads, head_dim),
        (pages, PAGE_SIZE, 2, heads, head_dim),
        (sequences, columns),
        (sequences,),
        (starts,),
        (tokens,),
    ]


def attention_dtypes(dtype: torch.dtype) -> list[torch.dtype]:
    return [dtype] * 3 + [torch.int32] * 4


def expert_shapes(plugin: KernelPlugin, rows: int = -1, routed: int = -1, slots: int = -1, tiles: int = -1):
    return {
        "ExpertsAlign": [(rows, TOP_K)],
        "ExpertsGateUp": [(rows, HIDDEN), (EXPERTS_COUNT, 2 * WIDTH, HIDDEN), (slots,), (tiles,)],
        "ExpertsDown": [(routed, WIDTH), (EXPERTS_COUNT, HIDDEN, WIDTH), (rows, TOP_K), (slots,), (tiles,)],
        "ExpertsCombine": [(routed, HIDDEN)],
    }[plugin.op_type]


def expert_dtypes(plugin: KernelPlugin, dtype: torch.dtype) -> list[torch.dtype]:
    return {
        "ExpertsAlign": [torch.int64],
        "ExpertsGateUp": [dtype, dtype, torch.int32, torch.int32],
        "ExpertsDown": [dtype, dtype, torch.float32, torch.int32, torch.int32],
        "ExpertsCombine": [dtype],
    }[plugin.op_type]


def expert_attributes(plugin: KernelPlugin, tile: moe.Tile) -> dict[str, int]:
    return {
        "ExpertsAlign": {"num_experts": EXPERTS_COUNT, "rows": tile.rows},
        "ExpertsGateUp": {"top_k": TOP_K, **tile_attributes(tile)},
        "ExpertsDown": tile_attributes(tile),
        "ExpertsCombine": {"top_k": TOP_K},
    }[plugin.op_type]


def built(tensorrt, plugin: KernelPlugin, shapes, dtypes, attributes) -> validators.Built:
    trt, _ = tensorrt
    inputs = [
        validators.Input(dtype=getattr(trt.DataType, DTYPES[dtype]), shape=shape)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    return validators.Built(trt, f"{NAMESPACE}::{plugin.op_type}", inputs, attributes)


def check_launch(layer: validators.Built, plugin: KernelPlugin, shapes, dtypes, attributes) -> validators.LaunchAt:
    """What TensorRT would launch at these shapes is what the kernel's own description launches."""
    meta = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in zip(shapes, dtypes, strict=True))
    own, at = plugin.describe(meta, **attributes), layer.at(*shapes)
    kernel = compile_for_plugin(own)
    assert at.grid == (*own.grid, 1, 1)[:3]
    assert at.block == (32 * own.num_warps, 1, 1)
    assert at.scalars == own.scalars
    assert at.output_shapes == [tuple(output.shape) for output in own.outputs]
    assert [each.name for each in layer.output_types] == [DTYPES[output.dtype] for output in own.outputs]
    assert at.shared_bytes == kernel.shared_bytes
    assert layer.kernel_name == kernel.name and layer.ptx == kernel.ptx
    return at


def check_ptx(layer: validators.Built, at: validators.LaunchAt, dtypes: list[torch.dtype], directory: Path) -> None:
    """The PTX takes what TensorRT passes, nothing else, and assembles for Hopper without spills."""
    arguments = ["pointer"] * len(dtypes)
    arguments += ["i32"] * len(at.scalars) + ["pointer"] * len(layer.output_types)
    (name, parameters), *others = re.findall(r"\.entry (\w+)\(([^)]*)\)", layer.ptx)
    assert name == layer.kernel_name and not others
    assert [PTX_TYPES[kind] for kind in re.findall(r"\.param \.(\w+)", parameters)] == arguments
    assert str(Path.cwd()) not in layer.ptx and ".debug" not in layer.ptx
    (directory / "kernel.ptx").write_text(layer.ptx)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [ptxas, "--gpu-name", "sm_90a", directory / "kernel.ptx", "-o", directory / "kernel.cubin"]
    subprocess.run(command, check=True, capture_output=True)
    used = resources(directory / "kernel.cubin")
    assert used["STACK"] == used["LOCAL"] == 0, "registers spilled"
    assert used["REG"] <= MAX_REGISTERS
    assert at.shared_bytes <= HOPPER_SHARED_BYTES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [0, 1], ids=["denoise", "encode"])
@pytest.mark.parametrize("name", LAYERS)
def test_attention(tensorrt, name, causal, dtype, tmp_path):
    attributes, dtypes = {"causal": causal, "window": LAYERS[name][2]}, attention_dtypes(dtype)
    layer = built(tensorrt, PAGED_ATTENTION, attention_shapes(name), dtypes, attributes)
    for tokens, sequences, columns in [(1, 1, 1), (63, 3, 2), (257, 5, 9), (64 * 256, 64, 8192)]:
        shapes = attention_shapes(name, tokens, sequences, 40, columns, sequences + 1)
        at = check_launch(layer, PAGED_ATTENTION, shapes, dtypes, attributes)
    check_ptx(layer, at, dtypes, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tile", [moe.FEW_ROWS, moe.MANY_ROWS], ids=["few rows", "many rows"])
@pytest.mark.parametrize("plugin", EXPERTS, ids=lambda plugin: plugin.op_type)
def test_experts(tensorrt, plugin, tile, dtype, tmp_path):
    if dtype == torch.float32:
        tile = moe.FLOAT32
    attributes, dtypes = expert_attributes(plugin, tile), expert_dtypes(plugin, dtype)
    layer = built(tensorrt, plugin, expert_shapes(plugin), dtypes, attributes)
    for rows in (1, 63, 257, 64 * 256):
        tiles = alignment.num_tiles(rows * TOP_K, EXPERTS_COUNT, tile.rows)
        shapes = expert_shapes(plugin, rows, rows * TOP_K, tiles * tile.rows, tiles)
        at = check_launch(layer, plugin, shapes, dtypes, attributes)
    check_ptx(layer, at, dtypes, tmp_path)


def test_outputs_of_one_plugin_fit_the_next_one():
    """The chain at symbolic sizes: 257 rows give every plugin the shapes that the launches of the whole operator have."""
    tile = moe.FEW_ROWS
    rows = Operand(dtype=torch.int64, shape=(257, TOP_K))
    align = ALIGN.launch([rows], expert_attributes(ALIGN, tile))
    hidden, gate_up, down = (
        Operand(dtype=torch.bfloat16, shape=shape)
        for shape in [(257, HIDDEN), (EXPERTS_COUNT, 2 * WIDTH, HIDDEN), (EXPERTS_COUNT, HIDDEN, WIDTH)]
    )
    activated = GATE_UP.launch([hidden, gate_up, *align.outputs], expert_attributes(GATE_UP, tile))
    weights = replace(rows, dtype=torch.float32)
    weighted = DOWN.launch([*activated.outputs, down, weights, *align.outputs], expert_attributes(DOWN, tile))
    (output,) = COMBINE.launch(weighted.outputs, expert_attributes(COMBINE, tile)).outputs
    assert output == hidden


def test_variants_of_a_kernel_have_names_of_their_own(tensorrt):
    kernels = {
        built(tensorrt, PAGED_ATTENTION, attention_shapes(name), attention_dtypes(torch.bfloat16), attributes).kernel_name
        for name in LAYERS
        for attributes in ({"causal": 0, "window": LAYERS[name][2]}, {"causal": 1, "window": LAYERS[name][2]})
    }
    assert len(kernels) == 4


def test_formats_are_the_declared_types_and_linear(tensorrt):
    shapes, dtypes = expert_shapes(DOWN), expert_dtypes(DOWN, torch.bfloat16)
    layer = built(tensorrt, DOWN, shapes, dtypes, expert_attributes(DOWN, moe.FEW_ROWS))
    assert [(each.type.name, each.format.name) for each in layer.formats] == [
        (name, "LINEAR") for name in ("BF16", "BF16", "FLOAT", "INT32", "INT32", "BF16")
    ]


def test_registering_twice_changes_nothing(tensorrt):
    register((PAGED_ATTENTION, *EXPERTS), *tensorrt)


def test_a_missing_attribute_is_refused(tensorrt):
    with pytest.raises(
        ValueError, match=r"plugin PagedAttention: got attributes \['causal'\], expected \['causal', 'window'\]"
    ):
        built(tensorrt, PAGED_ATTENTION, attention_shapes("full"), attention_dtypes(torch.bfloat16), {"causal": 1})


def test_a_type_without_a_kernel_is_refused(tensorrt):
    trt, _ = tensorrt
    inputs = [validators.Input(dtype=trt.DataType.INT8, shape=(-1, HIDDEN))]
    with pytest.raises(
        ValueError, match=r"plugin ExpertsCombine: input weighted has type DataType.INT8, which no kernel takes"
    ):
        validators.Built(trt, f"{NAMESPACE}::ExpertsCombine", inputs, {"top_k": TOP_K})


def test_a_size_that_must_be_fixed_is_refused():
    shapes = expert_shapes(GATE_UP, rows=4, slots=64, tiles=2)
    operands = [
        Operand(dtype=dtype, shape=shape) for shape, dtype in zip(shapes, expert_dtypes(GATE_UP, torch.bfloat16), strict=True)
    ]
    operands[0] = Operand(dtype=torch.bfloat16, shape=(4, object()))
    with pytest.raises(ValueError, match="kernel gate_up_kernel: constant HIDDEN is a size that varies; expected a fixed one"):
        GATE_UP.launch(operands, expert_attributes(GATE_UP, moe.FEW_ROWS))


def test_a_launch_that_depends_on_a_varying_size_is_refused():
    def describe(inputs, *, top_k):
        return moe.combine(inputs[0] if inputs[0].shape[0] > 64 else inputs[0][:1], top_k)

    plugin = replace(COMBINE, describe=describe)
    with pytest.raises(ValueError, match="kernel combine_kernel: its launch depends on sizes that vary: "):
        plugin.launch([Operand(dtype=torch.bfloat16, shape=(object(), HIDDEN))], {"top_k": TOP_K})


def test_declared_outputs_are_compared_with_the_launch():
    plugin = replace(COMBINE, outputs=(Output(name="output", rank=2, dtype=torch.float32),))
    with pytest.raises(ValueError, match=r"plugin ExpertsCombine: declares outputs .*float32.*, its launch has .*bfloat16"):
        plugin.launch([Operand(dtype=torch.bfloat16, shape=(8, HIDDEN))], {"top_k": TOP_K})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"global_scratch_size": 128}, "kernel combine_kernel: needs 128 bytes of scratch, expected 0"),
        ({"profile_scratch_size": 8}, "kernel combine_kernel: needs 8 bytes of profiler scratch, expected 0"),
        ({"num_ctas": 2}, "kernel combine_kernel: got num_ctas 2, expected 1"),
        ({"shared": 300_000}, "kernel combine_kernel: needs 300000 bytes of shared memory, expected at most 232448"),
    ],
)
def test_kernels_that_tensorrt_cannot_launch_are_refused(metadata, message, monkeypatch):
    usual = {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1, "shared": 0}
    compiled = SimpleNamespace(metadata=SimpleNamespace(**(usual | metadata)))
    monkeypatch.setattr(Launch, "compile", lambda launch, target: compiled)
    launch = moe.combine(torch.empty(8, 16, device="meta"), 8)
    with pytest.raises(ValueError, match=message):
        compile_for_plugin(launch)


PTX = """
.version 8.7
.target sm_90a, debug
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1,
	.param .u64 .ptr .global .align 1 kernel_param_2,
	.param .u64 .ptr .global .align 1 kernel_param_3
)
{
	.loc	1 2 3
	ld.param.b64 	%rd1, [kernel_param_0];
	ret;
}
	.file	1 "/somewhere/kernel.py"
	.section	.debug_info
	{
	}
"""


def test_hidden_arguments_and_debug_information_are_taken_out():
    ptx = plugin_ptx(PTX, "kernel", "kernel_1", 2)
    assert re.findall(r"kernel\w*", ptx) == ["kernel_1", "kernel_1_param_0", "kernel_1_param_1", "kernel_1_param_0"]
    assert "somewhere" not in ptx and ".loc" not in ptx and "debug" not in ptx


@pytest.mark.parametrize(
    ("ptx", "num_arguments", "message"),
    [
        (PTX, 3, "kernel kernel: takes 4 arguments, expected 3 and 2 pointers to scratch"),
        (PTX.replace("[kernel_param_0]", "[kernel_param_3]"), 2, "kernel kernel: reads its hidden argument 3"),
        (PTX.replace("entry kernel", "entry other"), 2, "kernel kernel: expected PTX with one entry of this name"),
    ],
)
def test_ptx_that_tensorrt_cannot_launch_is_refused(ptx, num_arguments, message):
    with pytest.raises(ValueError, match=message):
        plugin_ptx(ptx, "kernel", "kernel_1", num_arguments)
