"""Engine directories with one file cut short."""

import json
from pathlib import Path


def damaged_engine(source: Path, target: Path, name: str, *, keep: float) -> Path:
    """An engine like `source` at `target`, but for the file `name`, of which the first `keep` (0 to 1) is left."""
    target.mkdir()
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["checkpoint"]["path"] = str((source / manifest["checkpoint"]["path"]).resolve())
    (target / "manifest.json").write_text(json.dumps(manifest))
    for file in source.iterdir():
        if file.name not in (name, "manifest.json"):
            (target / file.name).symlink_to(file.resolve())
    content = (source / name).read_bytes()
    (target / name).write_bytes(content[: int(keep * len(content))])
    return target
