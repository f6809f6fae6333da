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


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", HopperDriver())


class Layer(torch.nn.Module):
    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (moe_op.experts(*inputs),)


def exported(device: str) -> torch.export.ExportedProgram:
    """The operator as a program, traced for any number of rows."""
    with FakeTensorMode(shape_env=ShapeEnv()), torch.device(device):
        hidden = torch.empty(40, 64, dtype=torch.bfloat16)
        gate_up_proj, down_proj = hidden.new_empty(16, 64, 64), hidden.new_empty(16, 64, 32)
        inputs = (hidden, torch.zeros(40, 8, dtype=torch.int64), torch.empty(40, 8), gate_up_proj, down_proj)
    rows = {0: torch.export.Dim("rows", min=2, max=16384)}
    return torch.export.export(Layer(), inputs, dynamic_shapes={"inputs": (rows, rows, rows, None, None)})


def calls(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_an_exported_program_names_no_implementation():
    for device in ("cpu", "cuda"):
        assert calls(exported(device).graph) == ["diffusiongemma.experts.default"]


def test_the_compiler_sees_the_kernels_and_that_they_write_their_outputs_only(hopper):
    """What it believes to be written, it copies first: for the weights that would be 1.5 GB a layer."""
    program = exported("cuda").run_decompositions(CUDA_DECOMPOSITIONS)
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    with inputs[0].fake_mode:
        traced, _ = aot_export_module(program.module(), inputs, trace_joint=False)
    kernels = [node for node in traced.graph.nodes if str(node.target) == "triton_kernel_wrapper_functional"]
    written = [node.kwargs["tensors_to_clone"] for node in kernels]
    assert written == [["row_order", "tile_expert"], ["activated"], ["weighted"], ["output"]]
    assert not [call for call in calls(traced.graph) if "clone" in call or "diffusiongemma" in call]
