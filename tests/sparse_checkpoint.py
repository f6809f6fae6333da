"""The 26B checkpoint without its weights: real configuration, names, shapes and headers; data that is a hole in the file."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

SHAPE_26B = Path(__file__).parent.parent / "checkpoints" / "diffusiongemma-26B-A4B"
SHARD_BYTES = 5_000_000_000
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}

Headers = Mapping[str, tuple[str, list[int]]]
"""Tensor → safetensors' name of its dtype, and its shape."""


def headers_26b() -> Headers:
    return {name: ("BF16", shape) for name, shape in json.loads((SHAPE_26B / "tensors.json").read_text()).items()}


def sparse_checkpoint(directory: Path, headers: Headers | None = None, **config: object) -> Path:
    """Writes shards of at most 5 GB, as Hugging Face does, whose zeros take no blocks of the disk, and their index. headers: of
    other tensors than the original's; config: what config.json has, too."""
    shutil.copytree(SHAPE_26B, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.md", "tensors.json"))
    path, headers = directory / "config.json", headers or headers_26b()
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    shards: list[dict[str, int]] = [{}]
    room = SHARD_BYTES
    for name, (dtype, shape) in headers.items():
        num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
        if num_bytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = num_bytes
        room -= num_bytes
    index = {}
    for number, sizes in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name, num_bytes in sizes.items():
            dtype, shape = headers[name]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + num_bytes]}
            end += num_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            os.truncate(opened.fileno(), 8 + len(text) + end)
        index |= dict.fromkeys(sizes, file)
    total = {"total_size": sum(sum(sizes.values()) for sizes in shards)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": index}))
    return directory
