"""How much memory of a GPU this process may still take."""

import torch


def free_bytes(device: torch.device) -> int:
    """What nobody has, and what PyTorch keeps and no tensor uses."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
