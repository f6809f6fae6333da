"""The GPUs after the first of an engine whose experts several share: what each must be and have room for.

They have their part of the experts' weights, and while a pass runs the rows of those; all else is on the first.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from backend.gpu_groups import group_name
from backend.gpu_memory import free_bytes
from backend.pass_memory import expert_rows_bytes
from contract.manifest import Manifest, ManifestError

_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class OtherGpus:
    """What each of `count` GPUs takes, in bytes."""

    count: int
    runtime_bytes: int
    weights_bytes: int
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.runtime_bytes + self.weights_bytes + self.workspace_bytes

    def report(self) -> str:
        """In a line, for people."""
        gpus = "GPU 1" if self.count == 1 else f"GPUs 1 to {self.count}, each"
        return (
            f"{gpus}  {self.total_bytes / _GB:.2f} GB = runtime {self.runtime_bytes / _GB:.2f} + weights "
            f"{self.weights_bytes / _GB:.2f} + workspace {self.workspace_bytes / _GB:.2f}"
        )


def other_gpus(manifest: Manifest, weights_bytes: int, rows: int, runtime_bytes: int) -> OtherGpus | None:
    """rows: of the largest pass. Twice, as on the first GPU: captured steps share no memory with passes that are not."""
    build = manifest.build
    if build.expert_gpus == 1:
        return None
    return OtherGpus(
        count=build.expert_gpus - 1,
        runtime_bytes=runtime_bytes,
        weights_bytes=weights_bytes,
        workspace_bytes=2 * rows * expert_rows_bytes(manifest.model, build),
    )


def connect_gpus(manifest: Manifest, engine_dir: Path) -> None:
    """Lets each GPU that the engine was built for reach the memory of the others.

    Raises:
        ManifestError: there are fewer, or others than the first, or two cannot reach each other.
    """
    wanted, rebuild = manifest.build.expert_gpus, "build the engine again, with another --expert-gpus"
    if (count := torch.cuda.device_count()) < wanted:
        raise ManifestError(
            f"{engine_dir}: got {count} visible GPUs, expected the {wanted} that share its experts; "
            f"pass serve --gpus {group_name(range(wanted))}, let CUDA_VISIBLE_DEVICES name more, or {rebuild}"
        )
    for gpu in range(1, wanted):
        if torch.cuda.get_device_capability(gpu) != manifest.gpu.compute_capability:
            raise ManifestError(
                f"{engine_dir}: built for {manifest.gpu}, but GPU {gpu} here is {torch.cuda.get_device_name(gpu)}; let "
                "CUDA_VISIBLE_DEVICES name others"
            )
    for one, other in itertools.permutations(range(wanted), 2):
        if not torch.cuda.can_device_access_peer(one, other):
            raise ManifestError(f"{engine_dir}: GPU {one} cannot reach the memory of GPU {other} here; {rebuild}")
        torch.empty(1, device=f"cuda:{other}").copy_(torch.empty(1, device=f"cuda:{one}"))  # from now on it may


def check_others_free(others: OtherGpus) -> None:
    """Compares what is to be allocated beside the weights with what is free.

    Raises:
        ManifestError: it is more.
    """
    for gpu in range(1, others.count + 1):
        if others.workspace_bytes > (free := free_bytes(torch.device("cuda", gpu))):
            raise ManifestError(
                f"memory: got {free / _GB:.2f} GB free beside the weights on GPU {gpu}, expected "
                f"{others.workspace_bytes / _GB:.2f} GB for passes; end what else uses it, or lower max_sequences"
            )
