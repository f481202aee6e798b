"""Small tensors on their way from the host to a device that is at work and need not stop for them."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. To a GPU it goes by pinned memory, which torch's allocator keeps until the
    copy is made: from other memory, a copy waits until the device has done all that it was given before."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
