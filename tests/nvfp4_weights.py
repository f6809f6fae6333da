"""Weights rounded to NVFP4 as Model Optimizer does: parts as published checkpoints have them, rows, and whole checkpoints."""

import itertools
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sparse_checkpoint import Headers

from builder.weights import is_of_experts
from contract.checkpoint import Checkpoint
from plugins.moe.fp8 import from_fp8
from plugins.moe.nvfp4 import GROUP, numbers_of, rows_of

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def parts_of(weight: torch.Tensor, factor: float | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers [R, C / 2] uint8, scales [R, C / 16] e4m3 and the factor [] of a weight [R, C]; the factor, if it is not given,
    makes the largest number 6 and its scale 448."""
    weight = weight.float()
    factor = torch.tensor(factor, device=weight.device) if factor else weight.abs().amax() / (6 * 448)
    groups = weight.unflatten(-1, (-1, GROUP)) / factor
    scales = (groups.abs().amax(-1) / 6).to(torch.float8_e4m3fn)
    ratio = groups / scales.float().unsqueeze(-1).clamp(min=2.0**-9)
    codes = (ratio.abs().unsqueeze(-1) - VALUES.to(ratio.device)).abs().argmin(-1) + 8 * (ratio < 0)
    even, odd = codes.flatten(-2).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return even | odd << 4, scales, factor


def random_rows(shape: tuple[int, int, int]) -> torch.Tensor:
    """Of all numbers and all finite scales, negative ones and 0, too, with a factor of 1e-3 for each row."""
    num_experts, rows, columns = shape
    numbers = torch.randint(256, (num_experts, rows, columns // 2), dtype=torch.uint8)
    scales = torch.randint(256, (num_experts, rows, columns // GROUP), dtype=torch.uint8)
    scales = torch.where(scales & 0x7F == 0x7F, 0x80, scales)
    return torch.cat([numbers, scales, (torch.randn(num_experts, rows, 1) * 1e-3).view(torch.uint8)], dim=-1)


def rounded_rows(weight: torch.Tensor, halves: int = 1, factor: float | None = None) -> torch.Tensor:
    """[E, R, bytes] of a weight [E, R, C], with a factor for each expert and each of its halves."""
    experts = [[rows_of(*parts_of(half, factor)) for half in expert.chunk(halves)] for expert in weight]
    return torch.stack([torch.cat(expert) for expert in experts])


def nvfp4_checkpoint(original: Path, directory: Path, *, packed: bool = False, dense: tuple[str, ...] = ()) -> Path:
    """`original` with its experts in NVFP4, each projection of each by itself, as Model Optimizer writes them, or packed as
    compressed-tensors does. dense: other weights that are in NVFP4, too."""
    directory.mkdir()
    tensors = {}
    for name, tensor in load_file(original / "model.safetensors").items():
        if is_of_experts(name):
            prefix, _, projection = name.rpartition(".")
            names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
            for expert, weight in enumerate(tensor):
                for part, of_part in zip(names, weight.chunk(len(names)), strict=True):
                    tensors |= stored_as(f"{prefix}.{expert}.{part}.weight", of_part, packed)
        else:
            tensors |= stored_as(name, tensor, packed) if name in dense else {name: tensor}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    config = json.loads((original / "config.json").read_text()) | {"quantization_config": CONFIGS[packed]}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "hf_quant_config.json").write_text("{}")
    for name in ("tokenizer.json", "generation_config.json"):
        (directory / name).write_bytes((original / name).read_bytes())
    return directory


def stored_as(name: str, weight: torch.Tensor, packed: bool) -> dict[str, torch.Tensor]:
    """The tensors of one weight, with a scale for activations, of which nothing is to be used. With the shapes that NVIDIA's
    and RedHatAI's checkpoints have."""
    numbers, scales, factor = parts_of(weight)
    if packed:
        factors = {f"{name}_global_scale": 1 / factor.view(1), f"{name[:-7]}.input_global_scale": torch.tensor(1.0)}
        return {f"{name}_packed": numbers, f"{name}_scale": scales} | factors
    return {name: numbers, f"{name}_scale": scales, f"{name}_scale_2": factor, f"{name[:-7]}.input_scale": torch.tensor(0.5)}


def nvfp4_headers(original: Headers, *, packed: bool = False) -> Headers:
    """As `nvfp4_checkpoint`; packed ones have their dense layers in NVFP4, too, as RedHatAI's."""
    headers: dict[str, tuple[str, list[int]]] = {}
    for name, (dtype, shape) in original.items():
        if is_of_experts(name):
            prefix, _, projection = name.rpartition(".")
            names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
            for expert, part in itertools.product(range(shape[0]), names):
                weight = f"{prefix}.{expert}.{part}.weight"
                headers |= _headers_of(weight, shape[1] // len(names), shape[2], packed)
        elif packed and re.search(r"decoder\.layers\.\d+\.mlp\.\w+_proj\.weight$", name):
            headers |= _headers_of(name, *shape, packed)
        else:
            headers[name] = dtype, shape
    return headers


def _headers_of(name: str, rows: int, columns: int, packed: bool) -> Headers:
    of_activations = f"{name.removesuffix('.weight')}.input{'_global' if packed else ''}_scale"
    factors = {f"{name}_global_scale": ("F32", [1])} if packed else {f"{name}_scale_2": ("F32", [])}
    return {
        f"{name}_packed" if packed else name: ("U8", [rows, columns // 2]),
        f"{name}_scale": ("F8_E4M3", [rows, columns // GROUP]),
        **factors,
        of_activations: ("F32", []),
    }


def with_numbers(original: Path, rewritten: Path, directory: Path) -> Path:
    """`original` with the numbers that the weights of `rewritten` stand for, which `quantize` wrote."""
    shutil.copytree(original, directory)
    tensors = Checkpoint(rewritten)
    numbers = {name: tensors.tensor(name) for name in tensors.names()}
    numbers |= {name: from_fp8(*numbers_of(rows)) for name, rows in numbers.items() if is_of_experts(name)}
    save_file(numbers, directory / "model.safetensors", {"format": "pt"})
    return directory


_GROUP = {"weights": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}}
CONFIGS = {
    False: {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {"group_0": _GROUP | {"input_activations": {"dynamic": False, "num_bits": 4}, "targets": ["Linear"]}},
        "ignore": ["lm_head", "model.decoder.layers.*.router*"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt"},
    },
    True: {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {
            "group_0": {
                "weights": _GROUP["weights"] | {"strategy": "tensor_group", "symmetric": True},
                "input_activations": {"num_bits": 4, "dynamic": "local", "strategy": "tensor_group"},
                "targets": ["Linear"],
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    },
}
"""By whether weights are packed as compressed-tensors has them."""
