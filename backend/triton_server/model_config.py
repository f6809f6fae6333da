"""`config.pbtxt` of the model: written from `Settings` and `signature`, and changed for one start of a server."""

import os
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from backend.triton_server.settings import Settings
from backend.triton_server.signature import INPUTS, OUTPUTS, TensorSpec

_HEADER = """\
# The model "diffusiongemma": a prompt in, the text of one canvas after another out.
# Written by `python -m backend config`; backend/triton_server/request.py and response.py say what every input and output means.

backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
"""


class ModelConfigError(Exception):
    """A config.pbtxt that cannot be used; one line."""


@dataclass(frozen=True, kw_only=True)
class Instances:
    """Replicas of the model, each with a front and an engine worker of its own; the server spreads requests over them.

    count: replicas, or replicas a GPU. gpus: the GPUs' numbers; without any the workers see the devices that the server sees.
    """

    count: int = 1
    gpus: tuple[int, ...] = ()

    def group(self) -> ModelInstanceGroup:
        kind = ModelInstanceGroup.KIND_GPU if self.gpus else ModelInstanceGroup.KIND_CPU
        return ModelInstanceGroup(kind=kind, count=self.count, gpus=self.gpus)


def config_pbtxt(settings: Settings, instances: Instances) -> str:
    """The text of config.pbtxt."""
    parts = [
        _HEADER,
        "# An instance is a front and an engine worker, which owns its device and batches by itself.",
        f"instance_group [ {{ {text_format.MessageToString(instances.group(), as_one_line=True)} }} ]\n",
    ]
    for name, value in settings.parameters().items():
        parts += textwrap.wrap(Settings.model_fields[name].description, 120, initial_indent="# ", subsequent_indent="# ")
        parts.append(f'parameters {{ key: "{name}" value {{ string_value: {_quoted(value)} }} }}')
    parts += ["", "input [", *_tensors(INPUTS, " optional: true"), "]\n"]
    parts += ["# A client that wants fewer names the outputs it wants; the server sends only those."]
    parts += ["output [", *_tensors(OUTPUTS, ""), "]\n"]
    return "\n".join(parts)


def changed_config(path: Path, parameters: Mapping[str, str], instances: Instances | None = None) -> str:
    """The config.pbtxt at `path` with other parameters and instances, and its engine_dir absolute.

    Raises ModelConfigError for a file that is no configuration and for parameters that there are not.
    """
    config = ModelConfig()
    try:
        text_format.Parse(path.read_text(encoding="utf-8"), config)
    except text_format.ParseError as error:
        raise ModelConfigError(f"{path}: {error}; write the file again with: python -m backend config") from None
    unknown = sorted(set(parameters) - set(Settings.model_fields))
    if unknown:
        known = ", ".join(Settings.model_fields)
        raise ModelConfigError(f"{path}: got the unknown parameters {', '.join(unknown)}, expected some of {known}")
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    engine_dir = config.parameters["engine_dir"].string_value or Settings().engine_dir
    config.parameters["engine_dir"].string_value = os.path.realpath(path.parent / engine_dir)
    if instances is not None:
        del config.instance_group[:]
        config.instance_group.append(instances.group())
    return text_format.MessageToString(config)


def seconds_to_load(text: str) -> float:
    """That the model of a config.pbtxt may take, one instance after the other; of one that is wrong, what it may by default."""
    config = text_format.Parse(text, ModelConfig())
    each = config.parameters["load_timeout_s"].string_value
    try:
        limits = Settings.from_parameters({"load_timeout_s": each} if each else {})
    except ValueError:
        limits = Settings()
    return limits.load_timeout_s * max(1, sum(max(1, group.count) * max(1, len(group.gpus)) for group in config.instance_group))


def _tensors(specs: Iterable[TensorSpec], suffix: str) -> list[str]:
    lines = [f'  {{ name: "{spec.name}" data_type: TYPE_{spec.datatype} dims: [ {spec.dims[0]} ]{suffix} }}' for spec in specs]
    return [f"{line}," for line in lines[:-1]] + lines[-1:]


def _quoted(text: str) -> str:
    escaped = "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{escaped}"'
