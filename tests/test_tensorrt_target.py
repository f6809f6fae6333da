"""The `tensorrt` target: profiles, lowering and building, over a strict fake of TensorRT and over the real TensorRT-RTX."""

import importlib
import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import TensorProto, helper

pytest.importorskip("triton", reason="the kernels are written in Triton's language")

from fake_tensorrt import FakeTensorRT
from onnx_once import LIMITS, NUM_EXPERTS, to_onnx_once
from plugin_cut import cut_plugins
from rich.console import Console
from tensorrt_plans import Plans, small_plans

from builder.build import build_engine
from builder.errors import BuildError
from builder.export import TracedProgram
from builder.targets import choose_target
from builder.targets.tensorrt import PlanBuilder
from builder.targets.tensorrt_lowering import compile_kernels, lower_to_plugins
from builder.targets.tensorrt_profiles import batch_sizes, check_profile, choose_profiles, image_sizes
from contract.manifest import Binding, Profile, read_manifest
from plugins.library import NAMESPACE
from plugins.moe.launch import FEW_ROWS, MANY_ROWS, choose_down_tile


@pytest.fixture(scope="module")
def plans() -> Plans:
    return small_plans()


@pytest.fixture(autouse=True)
def translated_once(monkeypatch):
    monkeypatch.setattr("builder.targets.tensorrt.to_onnx", to_onnx_once)


@pytest.fixture
def fake() -> FakeTensorRT:
    return FakeTensorRT()


@pytest.fixture(scope="module")
def head(plans) -> TracedProgram:
    return plans.programs["head"]


def head_builder(plans: Plans, fake: FakeTensorRT, **options) -> PlanBuilder:
    return PlanBuilder(fake.trt, plans.model, plans.build, trtp=fake.trtp, **options)


# -- What a plan comes to


def test_every_kernel_of_every_layer_is_a_plugin_in_the_plan(plans):
    kernels = [layer.kernel_name.rpartition("_")[0] for layer in plans.fake.plugins.values()]
    # encode has no second layer but its keys and values; denoise has both layers whole. The nodes of both have one name space.
    assert sorted(kernels) == sorted(
        ["paged_attention_kernel", "align_kernel", "gate_up_kernel", "down_kernel", "combine_kernel"] * 2
    )
    tensors = {name: json.loads((plans.plans / f"{name}.plan").read_text())["tensors"] for name in plans.programs}
    assert [each[:2] for each in tensors["head"]] == [
        ["hidden", "INPUT"],
        ["model.decoder.embed_tokens.weight", "INPUT"],
        ["output.0", "OUTPUT"],
    ]
    read_by_encode = {name for name, mode, *_ in tensors["encode"] if mode == "INPUT"}
    assert "kv_pages.0" in read_by_encode and "kv_pages.1" not in read_by_encode
    assert ["output.1", "OUTPUT", "FLOAT", [-1, 2, 1, 32]] in tensors["encode"]


def test_profiles_cover_what_the_build_allows(plans):
    assert [str(profile) for profile in plans.compiled["denoise"].profiles] == [
        f"batch {size}: sequences {size}, columns 1..256, sliding_attention.pages 1..4194303, full_attention.pages 1..4194303"
        for size in (1, 2, 4, 6)
    ]
    commit, prefill = plans.compiled["encode"].profiles
    assert (commit.sizes["tokens"], prefill.sizes["tokens"]) == ((1, 16, 16), (17, 48, 48))
    assert commit.sizes["starts"] == (2, 2, 7) and commit.sizes["images"] == (1, 1, 48)
    assert [str(profile) for profile in plans.compiled["head"].profiles] == ["rows: rows 1..40"]
    assert [str(profile) for profile in plans.compiled["vision"].profiles] == ["image 48: soft_tokens 48"]


@pytest.mark.parametrize(
    ("max_encode_tokens", "sizes"),
    [
        (48, (48,)),
        (70, (70,)),
        (300, (70, 140, 280, 300)),
        (1120, (70, 140, 280, 560, 1120)),
        (2048, (70, 140, 280, 560, 1120)),
    ],
)
def test_images_have_a_profile_each_budget_by_hand(max_encode_tokens, sizes):
    assert image_sizes(max_encode_tokens) == sizes


def test_profiles_of_the_real_model_are_within_what_tensorrt_addresses(plans):
    """Of a sliding layer's pages, the largest tensors: 16,383 pages, 524,256 tokens of cache."""
    pages = Binding(name="kv_pages.0", dtype="bfloat16", shape=("sliding_attention.pages", 32, 2, 8, 256))
    program = replace(plans.programs["denoise"], inputs=(pages,))
    assert choose_profiles(program, plans.model, plans.build)[0].sizes["sliding_attention.pages"] == (1, 1024, 16383)


def test_batch_sizes():
    assert [batch_sizes(most) for most in (1, 2, 6, 64)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8, 16, 32, 64)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "program head, profile 'p', binding 'hidden': size rows varies and has no range"),
        ({"rows": (1, 5, 4)}, "program head, profile 'p', size rows: got 1, 5, 4, expected at least 1 and ascending"),
        ({"rows": (0, 1, 4)}, "program head, profile 'p', size rows: got 0, 1, 4"),
        ({"rows": (1, 1, 1), "tokens": (1, 1, 1)}, "program head, profile 'p': size tokens is of no binding, expected rows"),
        (
            {"rows": (1, 1, 2**26)},
            r"binding 'hidden': \(67108864, 48\) has 3221225472 elements, expected at most 2147483647; build with smaller",
        ),
    ],
)
def test_profiles_are_compared_with_the_bindings(head, sizes, message):
    with pytest.raises(BuildError, match=message):
        check_profile(Profile(name="p", sizes=sizes), head)


# -- Lowering


def experts_model(node: onnx.NodeProto) -> onnx.ModelProto:
    shapes = {
        "rows": (TensorProto.BFLOAT16, ["tokens", 64]),
        "top_k_index": (TensorProto.INT64, ["tokens", 2]),
        "top_k_weights": (TensorProto.FLOAT, ["tokens", 2]),
        "gate_up_proj": (TensorProto.BFLOAT16, [4, 64, 64]),
        "down_proj": (TensorProto.BFLOAT16, [4, 64, 32]),
    }
    inputs = [helper.make_tensor_value_info(name, *value) for name, value in shapes.items()]
    outputs = [helper.make_tensor_value_info("output", TensorProto.BFLOAT16, ["tokens", 64])]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(NAMESPACE, 1)]
    return helper.make_model(helper.make_graph([node], "experts", inputs, outputs), opset_imports=opsets)


def node_of_ours(op_type="Experts", num_inputs=5, **attributes) -> onnx.NodeProto:
    names = ["rows", "top_k_index", "top_k_weights", "gate_up_proj", "down_proj"][:num_inputs]
    finds = {"plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1} | attributes
    return helper.make_node(op_type, names, ["output"], name="layer 7", domain=NAMESPACE, **finds)


def lowered(node: onnx.NodeProto) -> onnx.ModelProto:
    return lower_to_plugins(experts_model(node), num_experts=4, top_k=2, tile=FEW_ROWS)


def test_experts_become_four_kernels():
    model = lowered(node_of_ours())
    assert [node.op_type for node in model.graph.node] == ["ExpertsAlign", "ExpertsGateUp", "ExpertsDown", "ExpertsCombine"]
    onnx.checker.check_model(model)
    kernels = compile_kernels(model)
    assert list(kernels) == [f"layer 7.{node.op_type}" for node in model.graph.node]
    produced = {name for node in model.graph.node for name in node.output}
    read = {name for node in model.graph.node for name in node.input}
    assert "output" in produced and read - produced == {value.name for value in model.graph.input}


def test_each_product_has_its_own_tile():
    _, gate_up, down, _ = lower_to_plugins(experts_model(node_of_ours()), num_experts=4, top_k=2, tile=MANY_ROWS).graph.node
    widths = [{each.name: each.i for each in node.attribute}["width"] for node in (gate_up, down)]
    assert widths == [MANY_ROWS.width, choose_down_tile(MANY_ROWS).width] and widths[0] != widths[1]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (node_of_ours(num_inputs=4), "node layer 7: got 4 inputs, expected the five of the experts operator"),
        (node_of_ours("Sampler"), "node layer 7: operator Sampler has no TensorRT plugin, expected PagedAttention"),
        (node_of_ours("PagedAttention"), "node layer 7: got 5 inputs and 1 outputs, plugin PagedAttention has 7 and 1"),
        (
            node_of_ours("ExpertsCombine", 1),
            r"node layer 7: got attributes \['aot', .*\], expected \['aot', .*'top_k'\]",
        ),
        (
            node_of_ours("ExpertsCombine", 1, top_k=2, aot=0),
            "node layer 7: got {'aot': 0}, expected .*, by which TensorRT finds the plugin",
        ),
    ],
)
def test_nodes_without_their_plugin_are_refused(node, message):
    with pytest.raises(BuildError, match=message):
        lowered(node)


def test_kernels_that_cannot_be_described_name_their_node():
    model = lowered(node_of_ours())
    del model.graph.input[1]
    with pytest.raises(BuildError, match=r"node layer 7\.ExpertsAlign: the shapes of top_k_index are not in the graph"):
        compile_kernels(model)
    model = lowered(node_of_ours())
    model.graph.input[3].type.tensor_type.shape.dim[2].dim_param = "hidden"
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "hidden"
    with pytest.raises(BuildError, match=r"node layer 7\.ExpertsGateUp: kernel gate_up_kernel: constant HIDDEN is a size that"):
        compile_kernels(model)


# -- Building: every refusal of TensorRT


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("create_network", "program head: TensorRT made no network"),
        ("create_builder_config", "program head: TensorRT made no builder configuration"),
        ("set_shape", r"program head, profile 'rows', binding 'hidden': \(\(1, 48\), .*\) refused: min/opt/max"),
        ("profile", r"program head, profile 'rows': TensorRT finds it incomplete \(rows: rows 1..40\)"),
        ("add_optimization_profile", r"program head: profile 'rows' is not one that TensorRT accepts \(rows: rows 1..40\)"),
        ("build_serialized_network", r"program head: TensorRT built no plan; \[optimizer.cpp\] no implementation for node X$"),
        ("set_timing_cache", "program head: TensorRT accepts no timing cache"),
    ],
)
def test_every_refusal_of_tensorrt_is_an_error(plans, head, fake, call, message, tmp_path):
    fake.refuse.add(call)
    with pytest.raises(BuildError, match=message):
        head_builder(plans, fake, timing_cache=tmp_path / "cache").compile_program(head, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_error_of_the_parser_is_a_line(plans, head, fake, tmp_path):
    fake.refuse.add("parse")
    lines = "program head, node node_linear: no importer for it\nprogram head, node node_add: nor for this"
    with pytest.raises(BuildError, match=lines):
        head_builder(plans, fake).compile_program(head, tmp_path)


def test_a_network_that_is_not_the_programs_is_refused(plans, head, fake):
    model, (hidden,), (output,) = to_onnx_once(head), head.inputs, head.outputs
    cases = [
        ({"inputs": (), "outputs": (output,)}, "found an input 'hidden' that is none of its bindings"),
        ({"outputs": ()}, r"got outputs \['output.0'\], expected \[\]"),
        ({"outputs": (output.model_copy(update={"dtype": "bfloat16"}),)}, "binding 'output.0': got DataType.FLOAT, expected"),
        ({"inputs": (hidden.model_copy(update={"shape": ("rows", 47)}),)}, r"got shape \(-1, 48\), expected \(-1, 47\)"),
    ]
    for changes, message in cases:
        with pytest.raises(BuildError, match=f"program head.*{message}"):
            head_builder(plans, fake).build(replace(head, **changes), model, plans.compiled["head"].profiles)


def test_plugins_need_the_plugin_package(plans, fake, tmp_path):
    builder = PlanBuilder(fake.trt, plans.model, plans.build)
    with pytest.raises(BuildError, match="program denoise: has plugins, and tensorrt has no ahead-of-time plugins"):
        builder.compile_program(plans.programs["denoise"], tmp_path)


def test_the_timing_cache_is_kept_and_replaced_where_it_is_of_another_gpu(plans, head, fake, tmp_path):
    cache = tmp_path / "cache"
    for before, after in [(None, b"+"), (b"of this GPU", b"of this GPU+"), (b"of another GPU", b"+")]:
        if before is not None:
            cache.write_bytes(before)
        head_builder(plans, fake, timing_cache=cache).compile_program(head, tmp_path)
        assert cache.read_bytes() == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "head.plan"]


def test_progress_is_shown_and_goes(plans, head, fake, tmp_path):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    with console.status("compiling head"):  # as the command line does
        head_builder(plans, fake, console=console).compile_program(head, tmp_path)
    assert "head: Building" in shown.getvalue() and "head: Timing" in shown.getvalue()


# -- The command's way to it


def test_a_timing_cache_that_cannot_be_written_is_refused_before_anything_long(hopper, plans, tmp_path, monkeypatch):
    monkeypatch.setattr("builder.build.compile_plans", None)
    cache = tmp_path / "missing" / "cache"
    with pytest.raises(BuildError, match=rf"timing_cache: got {cache}, expected a file in a directory that can be written"):
        build_engine(plans.checkpoint, tmp_path / "engine", dtype="float32", timing_cache=cache)


@pytest.fixture
def hopper(fake, monkeypatch):
    """A machine with TensorRT and an H200, as far as the builder asks."""
    monkeypatch.setitem(sys.modules, "tensorrt", fake.trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", fake.trtp)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("builder.build.choose_device", lambda wanted: ("cuda", "a GPU is here"))
    return fake


def test_auto_builds_plans_where_it_can_and_says_why(hopper, plans, tmp_path, monkeypatch):
    """From the programs of `plans`, so it must ask for these."""

    def traced(signature, model, build):
        assert (model, build) == (plans.model, plans.build)
        return plans.programs[signature.name]

    monkeypatch.setattr("builder.onnx_export.export_program", traced)
    lines: list[str] = []
    build_engine(plans.checkpoint, tmp_path / "engine", dtype="float32", report=lines.append, **LIMITS)
    assert lines[0] == "target tensorrt (TensorRT and a GPU that it builds for are here), device cuda (a GPU is here)"
    manifest = read_manifest(tmp_path / "engine")
    assert manifest.tools["tensorrt"] == "11.4.0" and manifest.gpu.name == "NVIDIA H200"
    assert [program.file for program in manifest.programs.values()] == [
        "encode.plan",
        "denoise.plan",
        "head.plan",
        "vision.plan",
    ]
    assert [profile.name for profile in manifest.programs["denoise"].profiles] == [f"batch {size}" for size in (1, 2, 4, 6)]
    assert (tmp_path / "tensorrt.timing_cache").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": "cpu"}, "plans run on a GPU, and this build is for the CPU; use --device cuda"),
        ({"capability": (8, 9)}, "NVIDIA L4 has compute capability 8.9, the kernels are made for 9.0; use an H100 or H200"),
        ({"version": "10.13.3.9"}, r"TensorRT 10.13.3.9 is too old, expected 10.14 or newer; pip install '.\[tensorrt\]'"),
        ({"version": None}, r"TensorRT is not here \(.*\); pip install '.\[tensorrt\]'"),
        ({"triton": None}, "triton, which compiles the kernels, is not installed; it comes with PyTorch's CUDA builds"),
    ],
)
def test_what_is_missing_is_said_with_how_to_get_it(hopper, monkeypatch, changed, message):
    if "capability" in changed:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: changed["capability"])
    if "version" in changed:
        module = SimpleNamespace(__version__=changed["version"]) if changed["version"] else None
        monkeypatch.setitem(sys.modules, "tensorrt", module)
    if "triton" in changed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    device = changed.get("device", "cuda")
    with pytest.raises(BuildError, match=f"target 'tensorrt': {message}"):
        choose_target("tensorrt", device)
    target, reason = choose_target("auto", device)
    assert target == "inductor" and reason.startswith("no tensorrt: ")


# -- The same code over a real builder


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="a real TensorRT builder that needs no GPU")


def rtx_builder(rtx, plans: Plans, **options) -> PlanBuilder:
    def for_a_gpu_that_is_not_here(config) -> None:
        config.num_compute_capabilities = 1
        assert config.set_compute_capability(rtx.ComputeCapability.SM89, 0)

    return PlanBuilder(rtx, plans.model, plans.build, configure=for_a_gpu_that_is_not_here, **options)


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops in TensorRT-RTX")
def test_a_real_builder_builds_the_head_with_profile_timing_cache_and_progress(rtx, plans, head, tmp_path):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    builder = rtx_builder(rtx, plans, timing_cache=tmp_path / "cache", console=console)
    for _ in range(2):  # the second time with the timing cache of the first
        assert builder.compile_program(head, tmp_path).profiles == plans.compiled["head"].profiles
    assert (tmp_path / "head.plan").stat().st_size > 1000
    assert (tmp_path / "cache").stat().st_size > 0
    assert "head: Building engine" in shown.getvalue()


def test_a_real_builder_builds_everything_between_the_plugins(rtx, plans):
    """denoise with its plugins cut out: their outputs are inputs of the network, and their inputs its outputs."""
    program = plans.programs["denoise"]
    model = cut_plugins(to_onnx_once(program))
    names = {1: "float32", 6: "int32", 7: "int64"}

    def binding(value: onnx.ValueInfoProto) -> Binding:
        kind = value.type.tensor_type
        shape = tuple(each.dim_param or each.dim_value for each in kind.shape.dim)
        return Binding(name=value.name, dtype=names[kind.elem_type], shape=shape)

    known = {each.name for each in program.inputs} | set(program.weights)
    cut = replace(
        program,
        inputs=(*program.inputs, *(binding(value) for value in model.graph.input if value.name not in known)),
        outputs=tuple(map(binding, model.graph.output)),
    )
    length = plans.model.canvas_length
    profiles = tuple(
        Profile(name=each.name, sizes=each.sizes | {f"{length}*sequences": tuple(length * n for n in each.sizes["sequences"])})
        for each in plans.compiled["denoise"].profiles
    )
    for profile in profiles:
        check_profile(profile, cut)
    assert len(rtx_builder(rtx, plans).build(cut, model, profiles)) > 10_000


def test_a_real_parser_says_which_node_it_cannot_read(rtx, plans):
    program = plans.programs["denoise"]
    model = lower_to_plugins(to_onnx_once(program), num_experts=NUM_EXPERTS, top_k=8, tile=FEW_ROWS)
    with pytest.raises(BuildError, match=r"program denoise, node node_paged_attention: .*[Pp]lugin"):
        rtx_builder(rtx, plans).build(program, model, plans.compiled["denoise"].profiles)


def test_a_real_builder_refuses_a_profile_that_contradicts_the_network(rtx, plans, head):
    wrong = replace(head, inputs=(Binding(name="hidden", dtype="float32", shape=("rows", 48)),))
    descending = Profile.model_construct(name="p", sizes={"rows": (9, 5, 3)})
    with pytest.raises(BuildError, match=r"program head.*profile 'p'"):
        rtx_builder(rtx, plans).build(wrong, to_onnx_once(head), (descending,))
