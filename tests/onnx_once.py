"""Tracing a program and translating it to ONNX, each once a process: they take seconds."""

import functools

from builder.export import Signature, TracedProgram, export_program
from builder.onnx_export import to_onnx
from contract.manifest import BuildConfig
from contract.model_config import ModelConfig

_traced: dict[tuple[str, int, str, str], TracedProgram] = {}


def export_once(signature: Signature, model: ModelConfig, build: BuildConfig, minimum: int = 1) -> TracedProgram:
    """`export_program`; the same for the same arguments."""
    key = (signature.name, minimum, model.model_dump_json(), build.model_dump_json())
    if key not in _traced:
        _traced[key] = export_program(signature, model, build, minimum)
    return _traced[key]


to_onnx_once = functools.cache(to_onnx)
"""For what does not change the model, or changes a copy."""
