"""The compiler opens the experts operator for CUDA, on a machine without a GPU: tensors are fake, and so is the driver."""

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

triton = pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from hopper import HopperDriver  # noqa: E402

from plugins import moe_op  # noqa: E402
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
