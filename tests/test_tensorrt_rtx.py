"""Proof ladder, rung 6: the plugin-cut network at 26B size in bfloat16, built by TensorRT-RTX without a GPU."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from plugin_cut import cut_plugins

from builder.config import read_model_config
from builder.export import export_program, signatures, size_limits
from builder.onnx_export import to_onnx
from builder.weights import all_weights, binding_shapes
from contract.manifest import Binding, BuildConfig
from plugins.library import NAMESPACE

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
from tensorrt_rtx_build import RtxBuild, build_plan

REAL = read_model_config(Path(__file__).parent.parent / "checkpoints" / "diffusiongemma-26B-A4B")
# 2 of 30 layers, a sliding one and a full one as at the end of every six, and 2 of the 27 of vision, which are all alike:
# with all of them exporting takes two cores four minutes.
FEWER = {"layer_types": REAL.layer_types[4:6], "vision": REAL.vision.model_copy(update={"num_layers": 2})}
assert FEWER["layer_types"] == ("sliding_attention", "full_attention")
MODEL = REAL.model_copy(update=FEWER)
BUILD = BuildConfig(target="tensorrt", dtype="bfloat16")
LIMITS = size_limits(MODEL, BUILD)
PROGRAMS = ("denoise", "encode", "vision", "head")


@dataclass(frozen=True, kw_only=True)
class Built:
    """inputs, outputs: the program's bindings, weights included. constant_bytes: of what the ONNX model holds."""

    name: str
    inputs: tuple[Binding, ...]
    outputs: tuple[Binding, ...]
    num_plugin_nodes: int
    model_bytes: int
    constant_bytes: int
    rtx: RtxBuild


def build(name: str) -> Built:
    signature = next(each for each in signatures(MODEL, BUILD) if each.name == name)
    program = export_program(signature, MODEL, BUILD)
    model = to_onnx(program)
    shapes = binding_shapes(all_weights(MODEL))
    weights = (Binding(name=each, dtype=BUILD.dtype, shape=shapes[each]) for each in program.weights)
    return Built(
        name=name,
        inputs=(*program.inputs, *weights),
        outputs=program.outputs,
        num_plugin_nodes=sum(node.domain == NAMESPACE for node in model.graph.node),
        model_bytes=model.ByteSize(),
        constant_bytes=sum(each.ByteSize() for each in model.graph.initializer),
        rtx=build_plan(cut_plugins(model), LIMITS),
    )


@pytest.fixture(scope="module")
def building() -> Iterator[dict[str, Future]]:
    """All programs at once in processes of their own: exporting takes most of the time, and runs on one core."""
    with ProcessPoolExecutor(max_workers=2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield {name: pool.submit(build, name) for name in PROGRAMS}


@pytest.fixture(scope="module", params=PROGRAMS)
def built(request, building) -> Built:
    return building[request.param].result()


def fixed(bindings: tuple[Binding, ...]) -> list[Binding]:
    """With -1 for the name of a size that varies, as TensorRT has it."""
    return [
        Binding(name=each.name, dtype=each.dtype, shape=[-1 if isinstance(size, str) else size for size in each.shape])
        for each in bindings
    ]


def cut_bindings(name: str) -> tuple[list[Binding], list[Binding]]:
    """What the cut adds, nameless: what the plugins make, and what they are given and is not there already."""
    made, given = [], []
    if name == "vision":
        return _cut_vision()

    def add(bindings: list[Binding], dtype: str, *shape: int) -> None:
        bindings.append(Binding(name="", dtype=dtype, shape=(-1, *shape)))

    # The last layer of encode ends with its keys and values: nothing reads its attention.
    layer_types = {"denoise": MODEL.layer_types, "encode": MODEL.layer_types[:-1], "head": ()}[name]
    for layer, layer_type in enumerate(layer_types):
        attention = MODEL.attention[layer_type]
        add(made, "bfloat16", MODEL.num_attention_heads, attention.head_dim)
        add(given, "bfloat16", MODEL.num_attention_heads, attention.head_dim)
        if name == "denoise":  # for encode, the new keys and values are outputs, starts and image blocks are inputs
            add(given, "bfloat16", 2, attention.num_kv_heads, attention.head_dim)
            if layer == 0:
                add(given, "int32")
                add(given, "int32")
        add(made, "bfloat16", MODEL.hidden_size)
        add(given, "bfloat16", MODEL.hidden_size)
        add(given, "int64", MODEL.top_k_experts)
        add(given, "float32", MODEL.top_k_experts)
    return made, given


def _cut_vision() -> tuple[list[Binding], list[Binding]]:
    """Attention alone, over heads filled up to 128; each layer's keys and values are its pages too. What says that nothing is
    cached, and that no patch is of an image in a text, is the same for every layer."""
    vision = MODEL.vision

    def binding(dtype: str, *shape: int) -> Binding:
        return Binding(name="", dtype=dtype, shape=shape)

    heads = binding("bfloat16", -1, vision.num_attention_heads, 128)
    kv = (2, vision.num_kv_heads, 128)
    of_every_layer = [heads, binding("bfloat16", -1, *kv), binding("bfloat16", -1, 1, *kv)]
    of_the_first = [binding("int32", 1, 1), binding("int32", 1), binding("int32", -1)]
    return [heads] * vision.num_layers, of_every_layer + of_the_first + of_every_layer * (vision.num_layers - 1)


def nameless(bindings: tuple[Binding, ...]) -> list[Binding]:
    return [each.model_copy(update={"name": ""}) for each in bindings]


def test_the_network_has_the_bindings_of_the_program(built):
    made, given = cut_bindings(built.name)
    num_inputs, num_outputs = len(built.inputs), len(built.outputs)
    assert list(built.rtx.inputs[:num_inputs]) == fixed(built.inputs)
    assert list(built.rtx.outputs[:num_outputs]) == fixed(built.outputs)
    assert nameless(built.rtx.inputs[num_inputs:]) == made
    assert nameless(built.rtx.outputs[num_outputs:]) == given
    assert built.num_plugin_nodes == len(made)


def test_the_profile_has_the_limits_of_the_build(built):
    profiles = dict(built.rtx.profiles)
    for binding in built.inputs:
        sizes = [LIMITS.get(size, (size, size)) for size in binding.shape]
        if any(isinstance(size, str) for size in binding.shape):
            assert profiles.pop(binding.name) == tuple(zip(*sizes, strict=True))
        else:
            assert binding.name not in profiles
    rows = {"encode": (1, 2048), "denoise": (256, 64 * 256), "vision": (9, 9 * 1120)}
    for least, most in profiles.values():
        assert (least[0], most[0]) == rows[built.name]


def test_the_plan_holds_every_binding_and_no_weight(built):
    """Without a GPU's driver a plan cannot be loaded, so its bindings are looked for as bytes."""
    assert built.rtx.messages == ()
    missing = [each.name for each in (*built.rtx.inputs, *built.rtx.outputs) if each.name.encode() not in built.rtx.plan]
    assert not missing
    assert built.model_bytes < 1e6
    assert built.constant_bytes < 1e4
    assert len(built.rtx.plan) < 50e6
