"""The `quantization_config` of a checkpoint's `config.json`: read, and written by `quantize`.

| experts in | by | understood |
|---|---|---|
| FP8 | compressed-tensors | weights float8_e4m3 with a scale for each output channel, activations as they are or quantised as they come |
| NVFP4 | compressed-tensors, NVIDIA's Model Optimizer | weights e2m1 with an e4m3 scale for 16; whatever activations and the cache are to be, they stay in full precision |
"""  # noqa: E501

from typing import Any

from contract.model_config import ExpertsDtype
from plugins.moe.nvfp4 import GROUP as NVFP4_GROUP

FP8, NVFP4 = "float8_e4m3fn", "nvfp4"
CALLED = {FP8: "FP8", NVFP4: "NVFP4"}

SCALE_SUFFIX = "_scale"
"""Of a scale's name behind that of its weight, as compressed-tensors has it."""

_FP8_FORMATS = ("float-quantized", "naive-quantized")
_NVFP4_ROWS = "nvfp4-rows"  # as `quantize` writes them, see `plugins.moe.nvfp4`
_NVFP4_FORMATS = ("nvfp4-pack-quantized", _NVFP4_ROWS)
_STRATEGIES = ("channel", "tensor")
_CACHE, _OTHER_FEATURES = "kv_cache_scheme", ("sparsity_config", "transform_config", "moe_sparsity_config")
_NVFP4_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")  # with and without scales for activations


def _experts_only(stored: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {
        "targets": [r"re:.*\.experts$"],
        "weights": {"type": "float", "symmetric": True, "dynamic": False} | weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [],
    }


EXPERTS_ONLY: dict[ExpertsDtype, dict[str, Any]] = {
    FP8: _experts_only("float-quantized", {"num_bits": 8, "strategy": "channel"}),
    NVFP4: _experts_only(_NVFP4_ROWS, {"num_bits": 4, "strategy": "tensor_group", "group_size": NVFP4_GROUP}),
}
"""What `quantize` writes."""


def read_quantization(values: Any, problems: list[str]) -> ExpertsDtype | None:
    """The dtype of the experts' weights that a `quantization_config` stands for; adds a line to `problems` for each thing in it
    that is not understood."""
    if values is None:
        return None
    where = "quantization_config"
    method = values.get("quant_method") if isinstance(values, dict) else values
    if not isinstance(values, dict) or method not in ("compressed-tensors", "modelopt"):
        problems.append(
            f"{where}.quant_method: got {method!r}, expected 'compressed-tensors' or 'modelopt'; no other is supported"
        )
        return None
    if method == "modelopt":
        return _of_model_optimizer(values, where, problems)
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        problems.append(f"{where}.config_groups: got {groups!r}, expected at least one group")
        return None
    stored = values.get("format")
    kinds = {_read_group(group, stored, f"{where}.config_groups.{name}", problems) for name, group in groups.items()}
    features = _OTHER_FEATURES if kinds == {NVFP4} else (_CACHE, *_OTHER_FEATURES)
    for feature in features:
        if values.get(feature):
            problems.append(f"{where}.{feature}: got {values[feature]!r}, expected nothing; it is not supported")
    if len(kinds) > 1 and None not in kinds:
        problems.append(f"{where}.config_groups: got groups in FP8 and in NVFP4, expected one of the two")
    return kinds.pop()


def _of_model_optimizer(values: dict[str, Any], where: str, problems: list[str]) -> ExpertsDtype:
    if isinstance(values.get("quantization"), dict):  # as its own file, hf_quant_config.json, has it
        values, where = values["quantization"], f"{where}.quantization"
    algorithm = values.get("quant_algo")
    if str(algorithm).upper() not in _NVFP4_ALGORITHMS:
        problems.append(
            f"{where}.quant_algo: got {algorithm!r}, expected one of {', '.join(_NVFP4_ALGORITHMS)}; quantize the original "
            "checkpoint with: python -m builder quantize"
        )
    if values.get("group_size", NVFP4_GROUP) != NVFP4_GROUP:
        problems.append(f"{where}.group_size: got {values['group_size']!r}, expected {NVFP4_GROUP}; no other is supported")
    groups, expected = values.get("config_groups") or {}, {"num_bits": 4, "type": "float", "group_size": NVFP4_GROUP}
    for name, group in groups.items() if isinstance(groups, dict) else ():
        _check_weights(group, expected, f"{where}.config_groups.{name}", problems)
    return NVFP4


def _read_group(group: Any, default_format: Any, where: str, problems: list[str]) -> ExpertsDtype | None:
    """The dtype of the weights of a group by compressed-tensors; None: it is not understood."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        problems.append(f"{where}.weights: got {weights!r}, expected a description of FP8 or NVFP4 weights")
        return None
    stored = group.get("format") or default_format
    if stored in _NVFP4_FORMATS:
        wanted = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": NVFP4_GROUP}
        _check_weights(group, wanted, where, problems)
        return NVFP4
    if stored not in _FP8_FORMATS:
        problems.append(f"{where}.format: got {stored!r}, expected one of {', '.join(_FP8_FORMATS + _NVFP4_FORMATS[:1])}")
    _check_weights(group, {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}, where, problems)
    if weights.get("strategy") not in _STRATEGIES:
        problems.append(
            f"{where}.weights.strategy: got {weights.get('strategy')!r}, expected one of {', '.join(_STRATEGIES)}; "
            "quantize the original checkpoint with: python -m builder quantize"
        )
    inputs = group.get("input_activations")
    if isinstance(inputs, dict) and not inputs.get("dynamic"):
        problems.append(
            f"{where}.input_activations.dynamic: got {inputs.get('dynamic')!r}, expected true or no input_activations"
        )
    return FP8


def _check_weights(group: Any, expected: dict[str, Any], where: str, problems: list[str]) -> None:
    """Adds a line for each thing that a group says of its weights and that is not as expected."""
    weights = group.get("weights") if isinstance(group, dict) else None
    for key, value in expected.items():
        if isinstance(weights, dict) and weights.get(key, value) != value:
            problems.append(f"{where}.weights.{key}: got {weights[key]!r}, expected {value!r}; no other is supported")
