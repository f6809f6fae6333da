"""The compiler opens the experts operator for CUDA, on a machine without a GPU: tensors are fake, and so is the driver."""

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

triton = pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from hopper import HopperDriver  # noqa: E402

from plugins import moe_op  # noqa: E402
from plugins.moe import fp8_launch  # noqa: E402
from plugins.moe.cuda import CUDA_DECOMPOSITIONS  # noqa: E402
from plugins.moe.launch import choose_tile  # noqa: E402


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", HopperDriver())


class Layer(torch.nn.Module):
    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (moe_op.experts(*inputs),)


def exported(device: str, least_rows: int = 2) -> torch.export.ExportedProgram:
    """The operator as a program, traced for any number of rows from `least_rows` on."""
    with FakeTensorMode(shape_env=ShapeEnv()), torch.device(device):
        num_rows = least_rows + 38
        hidden = torch.empty(num_rows, 64, dtype=torch.bfloat16)
        gate_up_proj, down_proj = hidden.new_empty(16, 64, 64), hidden.new_empty(16, 64, 32)
        inputs = (hidden, torch.zeros(num_rows, 8, dtype=torch.int64), torch.empty(num_rows, 8), gate_up_proj, down_proj)
    rows = {0: torch.export.Dim("rows", min=least_rows, max=16384)}
    return torch.export.export(Layer(), inputs, dynamic_shapes={"inputs": (rows, rows, rows, None, None)})


def lowered(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """What the compiler gets: operators opened, kernels as nodes."""
    program = program.run_decompositions(CUDA_DECOMPOSITIONS)
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    with inputs[0].fake_mode:
        return aot_export_module(program.module(), inputs, trace_joint=False)[0]


def calls(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_an_exported_program_names_no_implementation():
    for device in ("cpu", "cuda"):
        assert calls(exported(device).graph) == ["diffusiongemma.experts.default"]


@pytest.mark.parametrize("least_rows", [2, 128, 130, 256, 2048])
def test_the_tile_is_the_one_for_the_fewest_rows(least_rows, hopper):
    traced = lowered(exported("cuda", least_rows))
    kernels = [node for node in traced.graph.nodes if str(node.target) == "triton_kernel_wrapper_functional"]
    arguments = [node.kwargs["kwargs"] for node in kernels]
    known = 1 << (least_rows.bit_length() - 1)
    tile = choose_tile(known, 8, 16, torch.bfloat16)
    assert [each["TILE_ROWS"] for each in arguments if "TILE_ROWS" in each] == [tile.rows] * 3
    assert choose_tile(2, 8, 16, torch.bfloat16).rows < choose_tile(2048, 8, 16, torch.bfloat16).rows


def test_the_compiler_sees_the_kernels_and_that_they_write_their_outputs_only(hopper):
    """What it believes to be written, it copies first: for the weights that would be 1.5 GB a layer."""
    traced = lowered(exported("cuda"))
    kernels = [node for node in traced.graph.nodes if str(node.target) == "triton_kernel_wrapper_functional"]
    written = [node.kwargs["tensors_to_clone"] for node in kernels]
    assert written == [["row_order", "tile_expert"], ["activated"], ["weighted"], ["output"]]
    assert not [call for call in calls(traced.graph) if "clone" in call or "diffusiongemma" in call]


# -- FP8 weights


class FP8Layer(torch.nn.Module):
    def __init__(self, fp8_rows: bool):
        super().__init__()
        self.fp8_rows = fp8_rows

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (moe_op.experts_fp8(*inputs, self.fp8_rows),)


@pytest.mark.parametrize("fp8_rows", [False, True])
def test_fp8_experts_are_opened_and_write_their_outputs_only(fp8_rows, hopper):
    least_rows = 256
    with FakeTensorMode(shape_env=ShapeEnv()), torch.device("cuda"):
        hidden, index = torch.empty(300, 64, dtype=torch.bfloat16), torch.zeros(300, 8, dtype=torch.int64)
        gate_up, down = (torch.empty(16, *shape, dtype=torch.float8_e4m3fn) for shape in ((64, 64), (64, 32)))
        inputs = (hidden, index, torch.empty(300, 8), gate_up, torch.empty(16, 64), down, torch.empty(16, 64))
    rows = {0: torch.export.Dim("rows", min=least_rows, max=16384)}
    program = torch.export.export(FP8Layer(fp8_rows), inputs, dynamic_shapes={"inputs": (rows, rows, rows, *[None] * 4)})
    assert calls(program.graph) == ["diffusiongemma.experts_fp8.default"]
    traced = lowered(program)
    kernels = [node for node in traced.graph.nodes if str(node.target) == "triton_kernel_wrapper_functional"]
    written = [node.kwargs["tensors_to_clone"] for node in kernels]
    scaled = ["scaled_rows", "row_scale"]
    assert written == [["row_order", "tile_expert"], scaled, ["activated"], scaled, ["weighted"], ["output"]]
    arguments = [node.kwargs["kwargs"] for node in kernels]
    tile = fp8_launch.choose_tile(least_rows, 8, 16, torch.bfloat16, fp8_rows)
    assert [each["TILE_ROWS"] for each in arguments if "TILE_ROWS" in each] == [tile.rows] * 3
    assert not [call for call in calls(traced.graph) if "clone" in call or "diffusiongemma" in call]
