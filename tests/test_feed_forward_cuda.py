"""The compiler opens the feed-forward operator for CUDA, on a machine without a GPU: tensors are fake, and so is the driver.
Where there is a GPU, the operator runs there, on its two streams, in and out of a CUDA graph."""

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

triton = pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from expert_formats import FORMATS, arranged, arranged_empty, is_fp8, representable  # noqa: E402
from feed_forward_operands import EPS, TOP_K, operands  # noqa: E402
from hopper import HopperDriver  # noqa: E402

from plugins import feed_forward_op  # noqa: E402
from plugins.feed_forward.launch import choose_tile, feed_forward  # noqa: E402
from plugins.feed_forward.mlp_launch import mlp_beside  # noqa: E402
from plugins.feed_forward.opened import CUDA_DECOMPOSITIONS  # noqa: E402
from plugins.feed_forward.reference import feed_forward_reference  # noqa: E402
from plugins.moe.alignment import MANY_ROUTED  # noqa: E402
from plugins.moe.formats import Format  # noqa: E402


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", HopperDriver())


class Layer(torch.nn.Module):
    def __init__(self, fp8_rows: bool = False):
        super().__init__()
        self.fp8_rows = fp8_rows

    def forward(self, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return feed_forward_op.feed_forward(*inputs, TOP_K, EPS, self.fp8_rows)


def exported(device: str, least_rows: int = 2, wanted: Format | None = None) -> torch.export.ExportedProgram:
    """The operator as a program, traced for any number of rows from `least_rows` on."""
    with FakeTensorMode(shape_env=ShapeEnv()), torch.device(device):
        *inputs, experts = operands(least_rows + 38, fp8=is_fp8(wanted))
        inputs = (*inputs, arranged_empty(experts, wanted))
    rows = {0: torch.export.Dim("rows", min=least_rows, max=16384)}
    unchanging = [[None] * 7, None, [None] * 2, [None] * 3, [None] * len(inputs[-1])]
    return torch.export.export(Layer(wanted == "narrow"), inputs, dynamic_shapes={"inputs": (rows, rows, *unchanging)})


def lowered(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """What the compiler gets: operators opened, kernels as nodes."""
    program = program.run_decompositions(CUDA_DECOMPOSITIONS)
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    with inputs[0].fake_mode:
        return aot_export_module(program.graph_module, inputs, trace_joint=False)[0]


def calls(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def kernels(traced: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in traced.graph.nodes if str(node.target) == "triton_kernel_wrapper_functional"]


def test_an_exported_program_names_no_implementation():
    for device in ("cpu", "cuda"):
        names = calls(exported(device).graph)
        assert [name for name in names if "getitem" not in name] == ["diffusiongemma.feed_forward.default"]


@pytest.mark.parametrize("least_rows", [2, 128, 130, 256, 2048])
def test_the_tile_is_the_one_for_the_fewest_rows(least_rows, hopper):
    traced = lowered(exported("cuda", least_rows))
    arguments = [node.kwargs["kwargs"] for node in kernels(traced)]
    experts = operands(1)[-1]

    def tile_rows(rows: int) -> int:
        return choose_tile(rows, TOP_K, experts, torch.bfloat16, False).rows

    known = 1 << (least_rows.bit_length() - 1)
    kernels_with_tiles = 3 if known * TOP_K < MANY_ROUTED else 4  # two of ordering in chunks
    assert [each["TILE_ROWS"] for each in arguments if "TILE_ROWS" in each] == [tile_rows(known)] * kernels_with_tiles
    assert tile_rows(2) < tile_rows(2048)


ENTERING = ["residual", "dense_rows", "expert_rows", "row_scale", "router_rows"]
ROUTING = [["parts"], ["top_k_weights", "top_k_index"], ["row_order", "tile_expert"]]
LEAVING = ["output", "normed"]


@pytest.mark.parametrize("wanted", FORMATS)
def test_the_compiler_sees_the_kernels_and_that_they_write_their_outputs_only(wanted, hopper):
    """What it believes to be written, it copies first: for the weights that would be 1.5 GB a layer."""
    traced = lowered(exported("cuda", 256, wanted))
    written = [node.kwargs["tensors_to_clone"] for node in kernels(traced)]
    between = [["scaled_rows", "row_scale"]] if is_fp8(wanted) else []
    assert written == [ENTERING, *ROUTING, ["activated"], *between, ["weighted"], LEAVING]
    assert not [call for call in calls(traced.graph) if "clone" in call or "diffusiongemma" in call]


# -- On a GPU


def at_once(*mlp: torch.Tensor):
    result = mlp_beside(*mlp)
    return lambda: result


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("wanted", FORMATS)
@pytest.mark.parametrize("rows", [1, 256, 1024, 4096])
def test_a_gpu_gives_what_the_definition_gives(rows, wanted):
    """Opened as for compilers and called, rows in the middle are as near to the definition in float32 as the definition's in
    bfloat16 are. Called on one stream or two, or replayed from a graph: the same bits, of the inputs of the moment."""
    torch.manual_seed(0)
    fp8_rows = wanted == "narrow"
    given = operands(rows, 256, 64, 128, fp8=is_fp8(wanted))
    given = (*given[:-1], representable(given[-1], wanted))
    wide = [[each.float() for each in part] if isinstance(part, list) else part.float() for part in given[:-1]]
    experts = given[-1] if is_fp8(wanted) else [each.float() for each in given[-1]]
    exact = feed_forward_reference(*wide, experts, TOP_K, EPS, False)
    expected = feed_forward_reference(*given, TOP_K, EPS, fp8_rows)
    bound = (*given[:-1], arranged(given[-1], wanted))
    on_gpu = [[each.cuda() for each in part] if isinstance(part, list) else part.cuda() for part in bound]

    def run(*rows: torch.Tensor):
        return feed_forward_op.feed_forward(*rows, *on_gpu[2:], TOP_K, EPS, fp8_rows)

    actual = run(*on_gpu[:2])
    one_stream = feed_forward(*on_gpu, TOP_K, EPS, fp8_rows, start_mlp=at_once)
    in_turn = feed_forward(*on_gpu, TOP_K, EPS, fp8_rows)
    for own, same, opened, others, precise in zip(actual, one_stream, in_turn, expected, exact, strict=True):
        errors = [(each.cpu().float() - precise).pow(2).mean(1).sqrt().median() for each in (own, opened, others)]
        assert max(errors[:2]) <= 1.2 * errors[2]
        assert torch.equal(own, same)

    held = [torch.zeros_like(each) for each in on_gpu[:2]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(*held)
    for each, value in zip(held, on_gpu[:2], strict=True):
        each.copy_(value)
    for _ in range(3):
        graph.replay()
        assert all(map(torch.equal, replayed, actual))
