"""Tracing a program and translating it to ONNX, each once a process: they take seconds. And a small model whose programs
several files use, in one process (see `conftest.py`)."""

import functools
from pathlib import Path

from small_checkpoints import random_checkpoint
from torch.onnx._internal._lazy_import import onnxscript_apis

from builder.export import Signature, TracedProgram, export_program
from builder.onnx_export import to_onnx
from contract.manifest import BuildConfig
from contract.model_config import ModelConfig

LIMITS = {"page_size": 8, "max_encode_tokens": 48, "max_sequences": 6, "max_head_rows": 40}
NUM_EXPERTS = 128
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}

_traced: dict[tuple[str, int, str, str], TracedProgram] = {}


def export_once(signature: Signature, model: ModelConfig, build: BuildConfig, minimum: int = 1) -> TracedProgram:
    """`export_program`; the same for the same arguments. The target plays no part in it."""
    key = (signature.name, minimum, model.model_dump_json(), build.model_copy(update={"target": "inductor"}).model_dump_json())
    if key not in _traced:
        _traced[key] = export_program(signature, model, build, minimum)
    return _traced[key]


onnxscript_apis.get_torchlib_ops = functools.cache(onnxscript_apis.get_torchlib_ops)
"""The exporter makes the table of all operators' translations for every program again, and only reads it: a second each."""

to_onnx_once = functools.cache(to_onnx)
"""For what does not change the model, or changes a copy."""


def small_checkpoint(directory: Path) -> Path:
    return random_checkpoint(directory, seed=9, num_experts=NUM_EXPERTS, moe_intermediate_size=8, **TWO_LAYERS)
