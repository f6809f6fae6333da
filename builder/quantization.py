"""The `quantization_config` of a checkpoint's `config.json`, in compressed-tensors' format: read, and written by `quantize`.

FP8 is understood: weights float8_e4m3 with a scale for each output channel, activations as they are or quantised as they come.
"""

from typing import Any, Literal

FP8 = "float8_e4m3fn"
SCALE_SUFFIX = "_scale"
"""Of a scale's name behind that of its weight, as compressed-tensors has it."""

_FORMATS = ("float-quantized", "naive-quantized")
_STRATEGIES = ("channel", "tensor")
_OTHER_FEATURES = ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config")

EXPERTS_ONLY: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": [r"re:.*\.experts$"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": None,
            "output_activations": None,
        }
    },
    "ignore": [],
}
"""What `quantize` writes."""


def read_quantization(values: Any, problems: list[str]) -> Literal["float8_e4m3fn"] | None:
    """The dtype of the experts' weights that a `quantization_config` stands for; adds a line to `problems` for each thing in it
    that is not understood."""
    if values is None:
        return None
    where = "quantization_config"
    if not isinstance(values, dict) or values.get("quant_method") != "compressed-tensors":
        got = values.get("quant_method") if isinstance(values, dict) else values
        problems.append(f"{where}.quant_method: got {got!r}, expected 'compressed-tensors'; no other format is supported")
        return None
    for feature in _OTHER_FEATURES:
        if values.get(feature):
            problems.append(f"{where}.{feature}: got {values[feature]!r}, expected nothing; it is not supported")
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        problems.append(f"{where}.config_groups: got {groups!r}, expected at least one group")
        return None
    for name, group in groups.items():
        _check_group(group, values.get("format"), f"{where}.config_groups.{name}", problems)
    return FP8


def _check_group(group: Any, default_format: Any, where: str, problems: list[str]) -> None:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        problems.append(f"{where}.weights: got {weights!r}, expected a description of FP8 weights")
        return
    stored = group.get("format") or default_format
    if stored not in _FORMATS:
        problems.append(f"{where}.format: got {stored!r}, expected one of {', '.join(_FORMATS)}")
    expected = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    for key, value in expected.items():
        if weights.get(key, value) != value:
            problems.append(f"{where}.weights.{key}: got {weights[key]!r}, expected {value!r}; only FP8 is supported")
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
