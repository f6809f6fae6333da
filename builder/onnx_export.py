"""Translates a traced program to ONNX: standard operators in float32 or bfloat16, and one node of our own domain an operator.

| in the graph | is |
|---|---|
| inputs | the program's `inputs`, then its `weights`, named as these bindings; a varying size has the binding's name for it |
| outputs | the program's `outputs` |
| a node `PagedAttention`, `Experts` | a call of `diffusiongemma::paged_attention`, `diffusiongemma::experts`: the operator's name in CamelCase, its tensors in order as inputs, its flags and numbers as int attributes, and the three attributes by which TensorRT's parser finds a plugin |

The model holds constants of a few kilobytes and no weight, also at 26B sizes.
"""  # noqa: E501

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset
from torch._ops import OpOverload

from builder.export import WITHOUT_ONNX, Signature, TracedProgram, export_program, signatures
from builder.staging import writing
from contract.manifest import BuildConfig
from contract.model_config import ModelConfig
from plugins.library import NAMESPACE

OPSET = 20
"""The first with Gelu; every TensorRT that has quickly deployable plugins parses it."""

_TENSOR_TYPES = [f"tensor({name})" for name in ("float", "bfloat16", "int32", "int64")]
_PLUGIN = {"plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1}
"""Attributes of every node of ours; `aot` asks for the plugin's ahead-of-time form, which needs no Python at run time."""


def write_onnx(model: ModelConfig, build: BuildConfig, directory: Path, report: Callable[[str], None]) -> None:
    """Writes every program as `<program>.onnx`."""
    for signature in (each for each in signatures(model, build) if each.name not in WITHOUT_ONNX):
        path = directory / f"{signature.name}.onnx"
        report(f"writing {path.name}")
        program = to_onnx(traced_for_onnx(signature, model, build))
        with writing(path):
            onnx.save(program, path)


def traced_for_onnx(signature: Signature, model: ModelConfig, build: BuildConfig) -> TracedProgram:
    """ONNX knows no device: the program is traced where tests trace it."""
    return export_program(signature, model, build.model_copy(update={"device": "cpu"}))


def to_onnx(program: TracedProgram) -> onnx.ModelProto:
    """See the module's docstring; `program` may be traced with fake weights, none is read."""
    ours = {node.target for node in program.exported.graph.nodes if getattr(node.target, "namespace", None) == NAMESPACE}
    with _quiet():
        translated = torch.onnx.export(
            program.exported,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table={operator: _translation(operator) for operator in ours},
            input_names=[*(binding.name for binding in program.inputs), *program.weights],
            output_names=[binding.name for binding in program.outputs],
            verbose=False,
        )
    model = translated.model_proto
    _strip(model)
    _name_sizes(model, program)
    onnx.checker.check_model(model)
    return model


def _translation(operator: OpOverload) -> Callable[..., Any]:
    """What writes a node for one call of `operator`."""
    tensors, scalars = [], []
    for argument in operator._schema.arguments:
        (tensors if isinstance(argument.type, torch.TensorType) else scalars).append(argument.name)
    outputs = [f"output_{index}" for index in range(len(operator._schema.returns))]
    name = "".join(word.capitalize() for word in operator._schema.name.partition("::")[2].split("_"))
    integer, string = OpSchema.AttrType.INT, OpSchema.AttrType.STRING
    attributes = dict.fromkeys(scalars, integer)
    attributes |= {attribute: integer if isinstance(value, int) else string for attribute, value in _PLUGIN.items()}
    schema = OpSchema(
        name,
        NAMESPACE,
        1,
        inputs=[OpSchema.FormalParameter(tensor, f"T_{tensor}") for tensor in tensors],
        outputs=[OpSchema.FormalParameter(output, f"T_{output}") for output in outputs],
        type_constraints=[(f"T_{each}", _TENSOR_TYPES, "") for each in (*tensors, *outputs)],
        attributes=[OpSchema.Attribute(attribute, kind) for attribute, kind in attributes.items()],
    )
    node = Op(Opset(NAMESPACE, 1), name, schema)

    def translate(*arguments):
        scalars_given = {name: int(value) for name, value in zip(scalars, arguments[len(tensors) :], strict=True)}
        return node(*arguments[: len(tensors)], **scalars_given, **_PLUGIN)

    return translate


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what PyTorch tells its own developers: about its pickled tree specs, and operators of torchvision."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")

    def is_wanted(record: logging.LogRecord) -> bool:
        return "torchvision" not in record.getMessage()

    logger.addFilter(is_wanted)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.removeFilter(is_wanted)


def _strip(model: onnx.ModelProto) -> None:
    """Removes what the exporter notes of its sources: stack traces with paths, many times the size of the graph."""
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _name_sizes(model: onnx.ModelProto, program: TracedProgram) -> None:
    """Puts the bindings' names of sizes in place of the tracer's symbols, "4*s70" becomes "4*sequences"."""
    names = {
        traced.dim_param: size
        for value, binding in zip(model.graph.input, program.inputs, strict=False)
        for traced, size in zip(value.type.tensor_type.shape.dim, binding.shape, strict=True)
        if isinstance(size, str)
    }
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for traced in value.type.tensor_type.shape.dim:
            if traced.dim_param:
                traced.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), traced.dim_param)
