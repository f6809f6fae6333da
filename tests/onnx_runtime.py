"""The exported ONNX programs in ONNX Runtime, with the operators' references as the implementation of our nodes.

ONNX Runtime has no operator in Python of its own; `onnxruntime-extensions` brings one, in the domain `ai.onnx.contrib`. So a
program runs whole, as one model that ONNX Runtime may optimise, and what is proved is the file that TensorRT gets: the nodes of
our domain only change their domain's name.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx_once import export_once, to_onnx_once
from onnxruntime_extensions import PyCustomOpDef, get_library_path, onnx_op

from backend.session import RunProgram, Session
from backend.weights import bind_weights
from builder.config import read_model_config
from builder.description import describe
from builder.export import TracedProgram, signatures
from builder.weights import all_weights
from contract.checkpoint import Checkpoint
from contract.manifest import BuildConfig, Program
from plugins.attention.reference import paged_attention_reference
from plugins.library import NAMESPACE
from plugins.moe.reference import experts_reference

_FLOAT, _INT32, _INT64 = PyCustomOpDef.dt_float, PyCustomOpDef.dt_int32, PyCustomOpDef.dt_int64


@onnx_op(
    op_type="PagedAttention",
    inputs=[_FLOAT] * 3 + [_INT32] * 4,
    outputs=[_FLOAT],
    attrs={"causal": _INT64, "window": _INT64},
)
def _paged_attention(*arrays: np.ndarray, causal: int, window: int) -> np.ndarray:
    return paged_attention_reference(*map(torch.tensor, arrays), causal=bool(causal), window=window).numpy()


@onnx_op(op_type="Experts", inputs=[_FLOAT, _INT64, _FLOAT, _FLOAT, _FLOAT], outputs=[_FLOAT])
def _experts(*arrays: np.ndarray) -> np.ndarray:
    return experts_reference(*map(torch.tensor, arrays)).numpy()


def onnx_program(program: TracedProgram) -> RunProgram:
    """`program` through ONNX: float32 tensors in the order of its inputs, then its weights → its outputs."""
    model = onnx.ModelProto()
    model.CopyFrom(to_onnx_once(program))
    for named in (*model.graph.node, *model.opset_import):
        if named.domain == NAMESPACE:
            named.domain = "ai.onnx.contrib"
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(get_library_path())
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return run


def onnx_session(
    checkpoint: Path,
    *,
    dtype: str = "float32",
    runner: Callable[[TracedProgram], RunProgram] = onnx_program,
    **choices,
) -> Session:
    """A session whose programs run as ONNX, in ONNX Runtime or by another `runner`."""
    model = read_model_config(checkpoint)
    build = BuildConfig(target="inductor", dtype=dtype, **choices)
    manifest = describe(model, build, Checkpoint(checkpoint), all_weights(model), checkpoint, checkpoint)
    traced = [export_once(signature, model, build) for signature in signatures(model, build)]
    programs = {each.name: Program(file="", inputs=each.inputs, weights=each.weights, outputs=each.outputs) for each in traced}
    manifest = manifest.model_copy(update={"programs": programs})
    runners = {each.name: runner(each) for each in traced}
    return Session(manifest, runners, bind_weights(manifest, checkpoint, checkpoint))
