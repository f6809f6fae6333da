"""A LoRA adapter as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.

An adapted linear layer, W x, is (W + s B A) x, where s is alpha / r, or alpha / sqrt(r) for a rank-stabilised adapter
(arXiv:2106.09685, arXiv:2312.03732). What is more than that is refused by name, rather than left out.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from builder.errors import BuildError
from builder.paths import check_path
from builder.rewriting import reading
from contract.problems import in_few_lines
from contract.regular_file import regular

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_OF_TRAINING = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
"""Keys that say how an adapter was trained, or which layers it has, as its tensors do."""
_KEEPS_WEIGHTS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin with an adapter. The others change the weights beside it, which then are not the checkpoint's."""


class _Config(BaseModel):
    model_config = ConfigDict(extra="allow")

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: FiniteFloat
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, FiniteFloat] = {}
    init_lora_weights: bool | str = True


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What is added to the weight of a linear layer, [out, in]: scale * b @ a."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def added_to(self, weight: Tensor) -> Tensor:
        """In float32, rounded once to the weight's dtype."""
        return (weight.float() + self.b.float() @ self.a.float() * self.scale).to(weight.dtype)


def read_adapter(directory: Path) -> dict[str, LowRank]:
    """Module, by its path in transformers' model → what is added to its weight.

    Raises:
        BuildError: there is no adapter, its files cannot be read, or it has more than low ranks of linear layers; a line for
            each of the first problems of a kind.
    """
    check_path(directory)
    config, parts = _read_config(directory / CONFIG), _read_tensors(directory / TENSORS)
    modules, added, unknown, wrong = set(), {}, [], []
    for name in sorted(parts):
        if name.startswith(_PREFIX) and name.endswith((_A, _B)):
            modules.add(name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B))
        else:
            unknown.append(f"{name}: got a tensor that is no part of a low rank; merge this adapter with PEFT")
    for module in sorted(modules):
        a, b = (parts.get(f"{_PREFIX}{module}{part}") for part in (_A, _B))
        rank = _of_pattern(config.rank_pattern, module, config.r)
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
            shapes = [None if each is None else list(each.shape) for each in (a, b)]
            wrong.append(f"{module}: got lora_A {shapes[0]} and lora_B {shapes[1]}, expected rank {rank} of both")
            continue
        if not all(each.float().isfinite().all() for each in (a, b)):  # float: of FP8 PyTorch cannot say
            wrong.append(f"{module}: has numbers that are not finite, expected none; take another save of the adapter")
            continue
        alpha = _of_pattern(config.alpha_pattern, module, config.lora_alpha)
        added[module] = LowRank(a=a, b=b, scale=alpha / (rank**0.5 if config.use_rslora else rank))
    if problems := in_few_lines(directory / TENSORS, unknown, wrong):
        raise BuildError(problems)
    if not added:
        raise BuildError(f"{directory / TENSORS}: got no low rank, expected one at least")
    return added


def _read_config(path: Path) -> _Config:
    try:
        with reading(path):
            config = _Config.model_validate(json.loads(regular(path).read_bytes()))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, each['loc']))}: got {each['input']!r}: {each['msg']}" for each in error.errors()]
        raise BuildError(in_few_lines(path, lines)) from None
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{path}: not JSON ({error}); save the adapter again") from None
    unsupported = [
        f"{key}: got {value!r}, which merge does not know; merge this adapter with PEFT"
        for key, value in sorted((config.model_extra or {}).items())
        if key not in _OF_TRAINING and value not in (None, False, "none", {}, [])
    ]
    if config.init_lora_weights not in _KEEPS_WEIGHTS:
        unsupported.append(
            f"init_lora_weights: got {config.init_lora_weights!r}, which changes the checkpoint's own weights; save the "
            "adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    if unsupported:
        raise BuildError(in_few_lines(path, unsupported))
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    pickled = path.with_suffix(".bin")
    if pickled.exists() and not path.exists():
        raise BuildError(
            f"{pickled}: got a pickle, as older versions of PEFT save, expected {TENSORS}; load the adapter with PEFT and save "
            "it again"
        )
    with reading(path):
        return load_file(regular(path))


def _of_pattern(pattern: Mapping[str, float], module: str, other: float) -> float:
    """The value of the first key that is the module's path, or its end, as a regular expression; `other` if none is.

    Raises:
        BuildError: a key is no regular expression.
    """
    for key, value in pattern.items():
        try:
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        except re.error as error:
            raise BuildError(f"{CONFIG}: got the pattern {key!r}, expected a regular expression ({error})") from None
    return other
