"""How many sequences of which length an engine holds at once in so much memory: `python -m backend plan`."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from backend.planner import EngineLimits, plan_memory
from contract.manifest import Manifest, ManifestError

LENGTHS = (1024, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The most sequences of `num_tokens` cached tokens each that are there at once, and what their keys and values and
    everything together take. A sequence's cached tokens are its prompt and its canvases but the last."""

    num_tokens: int
    num_sequences: int
    kv_bytes: int
    total_bytes: int


def parse_bytes(text: str) -> int:
    """A size such as "80GB", "79.6 GiB" or a number of bytes.

    Raises:
        ManifestError: it is none.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]I?B|)\s*", text.upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not size:
        raise ManifestError(f"memory: got {text!r}, expected a size such as 80GB, 79.6GiB or a number of bytes")
    return size


def capacities(manifest: Manifest, memory_bytes: int, *, device_type: str, lengths: Sequence[int] = LENGTHS) -> list[Capacity]:
    """Of each length that the model has positions for; 0 sequences where not even one fits. `max_sequences` of the build bounds
    them all."""
    most = manifest.model.max_position_embeddings
    return [
        _capacity(manifest, memory_bytes, length, device_type) for length in dict.fromkeys(min(each, most) for each in lengths)
    ]


def _capacity(manifest: Manifest, memory_bytes: int, num_tokens: int, device_type: str) -> Capacity:
    fitting = Capacity(num_tokens=num_tokens, num_sequences=0, kv_bytes=0, total_bytes=0)
    for count in range(1, manifest.build.max_sequences + 1):
        limits = EngineLimits(max_sequences=count, max_cached_tokens=1, prefix_cache=False)
        one = plan_memory(manifest, limits, device_type=device_type)
        needed = one.needed_by_each(num_tokens)
        plan = replace(one, num_pages={kind: count * pages for kind, pages in needed.items()})
        if plan.total_bytes > memory_bytes:
            break
        fitting = replace(fitting, num_sequences=count, kv_bytes=plan.kv_bytes, total_bytes=plan.total_bytes)
    return fitting


def table(rows: Iterable[Capacity]) -> Table:
    """For people."""
    shown = Table("tokens each", "sequences at once", "KV pages, GB", "in all, GB")
    for column in shown.columns:
        column.justify = "right"
    for row in rows:
        sizes = (f"{row.kv_bytes / _GB:.2f}", f"{row.total_bytes / _GB:.2f}") if row.num_sequences else ("", "")
        shown.add_row(f"{row.num_tokens:,}", str(row.num_sequences) if row.num_sequences else "none", *sizes)
    return shown
