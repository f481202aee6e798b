"""What of a machine decides its attention kernels, and the order of kernels while a run is at work."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from weft.math.sdpa_policy import FLASH_PACKAGES, Chip, Policy

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def chip_of(device: torch.device) -> Chip:
    """What a policy is made from."""
    if device.type != "cuda":
        return Chip(device.type)
    known = list_flash_attention_impls()
    flash = tuple(name for name, package in FLASH_PACKAGES.items() if name in known and is_installed(package))
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return Chip("cuda", torch.cuda.get_device_capability(device), version, torch.version.hip is not None, flash)


def is_installed(package: str) -> bool:
    """Whether a package, or one inside another, can be imported."""
    outer = package.partition(".")[0]
    return find_spec(outer) is not None and find_spec(package) is not None


@contextmanager
def in_order(policy: Policy) -> Iterator[None]:
    """Inside, torch's attention goes by the policy, on all threads: recomputed blocks too, which autograd's own threads
    run. Never inside of a compiled function: what is compiled meanwhile keeps the kernels that it was compiled with."""
    if policy.flash is not None:
        activate_flash_attention_impl(policy.flash)
    try:
        if not policy.order:
            yield
            return
        with sdpa_kernel([BACKENDS[name] for name in policy.order], set_priority=True):
            yield
    finally:
        if policy.flash is not None:
            restore_flash_attention_impl()
