"""Seeds that are a pure function of what they are for: a resumed run draws what the unbroken run would have drawn."""

from hashlib import blake2b

import torch


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed for a place such as (run seed, "noise", step, rank)."""
    digest = blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """A generator on the device, seeded for a place."""
    return torch.Generator(device=device).manual_seed(seed_of(*parts))
