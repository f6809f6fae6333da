"""Rewrites an exported program's ONNX graph into what TensorRT's parser can build: a node of ours for every kernel.

`PagedAttention` is one kernel and stays. `Experts` is four, which pass each other what they need:

    Experts(rows, top_k_index, top_k_weights, gate_up_proj, down_proj)
      → ExpertsAlign → ExpertsGateUp → ExpertsDown → ExpertsCombine

The kernels' tile is chosen here, once a program. See `plugins.moe.tensorrt`.
"""

import onnx
import sympy
import torch
from onnx import TensorProto, helper

from builder.errors import BuildError
from plugins.attention.tensorrt import PAGED_ATTENTION
from plugins.library import NAMESPACE
from plugins.moe.launch import Tile, choose_down_tile
from plugins.moe.tensorrt import ALIGN, COMBINE, DOWN, EXPERTS, GATE_UP, tile_attributes
from plugins.plugin_ptx import PluginKernel, compile_for_plugin
from plugins.symbolic_launch import Operand
from plugins.tensorrt_plugin import VERSION, KernelPlugin

PLUGINS = (PAGED_ATTENTION, *EXPERTS)

_FINDS_PLUGIN = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION, "aot": 1}
"""Attributes by which TensorRT's parser finds a plugin and asks for its ahead-of-time form."""

_DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
}


def lower_to_plugins(model: onnx.ModelProto, *, num_experts: int, top_k: int, tile: Tile) -> onnx.ModelProto:
    """A copy of `model` whose nodes of our domain are those of `PLUGINS`; the experts' products use `tile`.

    Raises:
        BuildError: a node of our domain that no plugin implements, or with other inputs or attributes than its plugin has.
    """
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    del lowered.graph.node[:]
    for node in model.graph.node:
        if node.domain == NAMESPACE and node.op_type == "Experts":
            lowered.graph.node.extend(_experts(node, num_experts, top_k, tile))
        else:
            lowered.graph.node.append(node)
    for node in lowered.graph.node:
        if node.domain == NAMESPACE:
            _check(node)
    return lowered


def drop_unused_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` without the inputs that no node reads, changed in place: TensorRT need not keep those in a plan.

    `encode` has some: only keys and values come out, so that the last layer's other weights do nothing.
    """
    read = {name for node in model.graph.node for name in node.input}
    kept = [value for value in model.graph.input if value.name in read]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model


def compile_kernels(model: onnx.ModelProto) -> dict[str, PluginKernel]:
    """Node name → kernel, for every plugin node of a lowered model: what the plan will hold, compiled without TensorRT.

    TensorRT calls the plugins from inside the builder, where a failure has no good way out; so every one is described and
    compiled here first. Kernels are kept, and TensorRT gets the same ones.

    Raises:
        BuildError: a node's kernel cannot be described or compiled; names the node.
    """
    known = {value.name: _operand(value) for value in (*model.graph.input, *model.graph.output, *model.graph.value_info)}
    plugins = {plugin.op_type: plugin for plugin in PLUGINS}
    kernels = {}
    for node in model.graph.node:
        if node.domain != NAMESPACE:
            continue
        missing = [name for name in node.input if name not in known]
        if missing:
            raise BuildError(f"node {node.name}: the shapes of {', '.join(missing)} are not in the graph")
        try:
            launch = plugins[node.op_type].launch([known[name] for name in node.input], _scalars(node))
            kernels[node.name] = compile_for_plugin(launch)
        except ValueError as error:
            raise BuildError(f"node {node.name}: {error}") from None
        known.update(zip(node.output, launch.outputs, strict=True))
    return kernels


def _experts(node: onnx.NodeProto, num_experts: int, top_k: int, tile: Tile) -> list[onnx.NodeProto]:
    if len(node.input) != 5:
        raise BuildError(f"node {node.name}: got {len(node.input)} inputs, expected the five of the experts operator")
    rows, top_k_index, top_k_weights, gate_up_proj, down_proj = node.input
    (output,) = node.output
    row_order, tile_expert, activated, weighted = (
        f"{node.name}.{name}" for name in ("row_order", "tile_expert", "activated", "weighted")
    )
    order, sizes, down_sizes = [row_order, tile_expert], tile_attributes(tile), tile_attributes(choose_down_tile(tile))

    def plugin_node(plugin: KernelPlugin, inputs: list[str], outputs: list[str], **attributes: int) -> onnx.NodeProto:
        name = f"{node.name}.{plugin.op_type}"
        return helper.make_node(plugin.op_type, inputs, outputs, name=name, domain=NAMESPACE, **attributes, **_FINDS_PLUGIN)

    return [
        plugin_node(ALIGN, [top_k_index], order, num_experts=num_experts, rows=tile.rows),
        plugin_node(GATE_UP, [rows, gate_up_proj, *order], [activated], top_k=top_k, **sizes),
        plugin_node(DOWN, [activated, down_proj, top_k_weights, *order], [weighted], **down_sizes),
        plugin_node(COMBINE, [weighted], [output], top_k=top_k),
    ]


def _check(node: onnx.NodeProto) -> None:
    plugins = {plugin.op_type: plugin for plugin in PLUGINS}
    if node.op_type not in plugins:
        raise BuildError(f"node {node.name}: operator {node.op_type} has no TensorRT plugin, expected {', '.join(plugins)}")
    plugin = plugins[node.op_type]
    if len(node.input) != len(plugin.inputs) or len(node.output) != len(plugin.outputs):
        raise BuildError(
            f"node {node.name}: got {len(node.input)} inputs and {len(node.output)} outputs, plugin {node.op_type} has "
            f"{len(plugin.inputs)} and {len(plugin.outputs)}"
        )
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    found = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    wanted = {*plugin.attributes, *_FINDS_PLUGIN}
    if set(found) != wanted:
        raise BuildError(f"node {node.name}: got attributes {sorted(found)}, expected {sorted(wanted)}")
    wrong = {name: found[name] for name, value in _FINDS_PLUGIN.items() if found[name] != value}
    if wrong:
        raise BuildError(f"node {node.name}: got {wrong}, expected {_FINDS_PLUGIN}, by which TensorRT finds the plugin")


def _scalars(node: onnx.NodeProto) -> dict[str, int]:
    return {each.name: each.i for each in node.attribute if each.name not in _FINDS_PLUGIN}


def _operand(value: onnx.ValueInfoProto) -> Operand:
    kind = value.type.tensor_type
    shape = tuple(each.dim_value if each.HasField("dim_value") else sympy.Symbol(each.dim_param) for each in kind.shape.dim)
    return Operand(dtype=_DTYPES.get(kind.elem_type), shape=shape)
