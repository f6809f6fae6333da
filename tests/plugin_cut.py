"""The plugin-cut network: what is left of an ONNX program for a TensorRT that has no plugins.

Each node of our domain is removed. What it made becomes an input of the network and what it was given an output, so that every
other operator is still built, with the types and sizes that it has in the whole program.
"""

import onnx

from plugins.library import NAMESPACE


def cut_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` without nodes of our domain; new inputs and outputs follow the old ones, in the nodes' order."""
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    graph, removed = cut.graph, [node for node in cut.graph.node if node.domain == NAMESPACE]
    known = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    there = {value.name for value in (*graph.input, *graph.initializer)}
    made = list(dict.fromkeys(name for node in removed for name in node.output))
    given = dict.fromkeys(name for node in removed for name in node.input)
    wanted = [name for name in given if name not in there | {*made} | {value.name for value in graph.output}]
    for node in removed:
        graph.node.remove(node)
    for opset in [each for each in cut.opset_import if each.domain == NAMESPACE]:
        cut.opset_import.remove(opset)
    graph.input.extend(known[name] for name in made)
    graph.output.extend(known[name] for name in wanted)
    return cut
