"""The exported ONNX programs in the reference evaluator of ONNX, which has bfloat16 where ONNX Runtime on the CPU has not.

Its operators are the standard's definitions, in NumPy: a rounding that the exporter puts in the wrong place shows.
"""

import ml_dtypes
import numpy as np
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from backend.session import RunProgram
from builder.export import TracedProgram
from builder.onnx_export import to_onnx
from plugins.attention.reference import paged_attention_reference
from plugins.library import NAMESPACE
from plugins.moe.reference import experts_reference


class PagedAttention(OpRun):
    op_domain = NAMESPACE

    def _run(self, *arrays, causal, window, **finds_plugin):
        return (_array(paged_attention_reference(*map(_tensor, arrays), causal=bool(causal), window=window)),)


class Experts(OpRun):
    op_domain = NAMESPACE

    def _run(self, *arrays, **finds_plugin):
        return (_array(experts_reference(*map(_tensor, arrays))),)


def reference_program(program: TracedProgram) -> RunProgram:
    """`program` through ONNX: tensors in the order of its inputs, then its weights → its outputs."""
    evaluator = ReferenceEvaluator(to_onnx(program), new_ops=[PagedAttention, Experts])

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        feeds = {name: _array(tensor) for name, tensor in zip(evaluator.input_names, tensors, strict=True)}
        return [_tensor(array) for array in evaluator.run(None, feeds)]

    return run


def _array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))
