"""The 26B checkpoint without its weights: real configuration, names, shapes and headers; data that is a hole in the file."""

import json
import math
import os
import shutil
from pathlib import Path

SHAPE_26B = Path(__file__).parent.parent / "checkpoints" / "diffusiongemma-26B-A4B"
SHARD_BYTES = 5_000_000_000
_ITEM_BYTES = 2  # bfloat16, as the checkpoint's


def sparse_checkpoint(directory: Path) -> Path:
    """Writes shards of at most 5 GB, as Hugging Face does, whose zeros take no blocks of the disk, and their index."""
    shutil.copytree(SHAPE_26B, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.md", "tensors.json"))
    shapes = json.loads((SHAPE_26B / "tensors.json").read_text())
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * _ITEM_BYTES
        if sum(shards[-1].values()) + num_bytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = num_bytes
    index = {}
    for number, sizes in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for name, num_bytes in sizes.items():
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + num_bytes]}
            end += num_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            os.truncate(opened.fileno(), 8 + len(text) + end)
        index |= dict.fromkeys(sizes, file)
    total = {"total_size": sum(math.prod(shape) for shape in shapes.values()) * _ITEM_BYTES}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": index}))
    return directory
