"""What a process has of its device's memory, cheaply enough to ask after every step."""

import os
from pathlib import Path

import torch


def footprint(device: torch.device) -> int | None:
    """Bytes that torch's allocator has of the GPU, or this process of the machine; None where the system does not tell.

    On a GPU the allocator gives little back, so after a step it is near the step's peak.
    """
    if device.type == "cuda":
        # As torch.cuda.memory_reserved, which would flatten and sort all that is known first.
        return torch.cuda.memory_stats_as_nested_dict(device)["reserved_bytes"]["all"]["current"]
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
