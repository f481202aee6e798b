"""Weights that no file holds: a list of names and shapes whose numbers are drawn when they are read, for benches.

A list is a file beside a config, NAME -> [dtype, shape] in JSON. What reads weights reads it as it reads safetensors,
so that a network of a released size goes through the same loading, packing and placing as a real one. Numbers are
normal with deviation 0.02, biases 0, norms 1; never all zeros, with which devices run faster than with real weights.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from weft.errors import ModelError
from weft.math.chance import generator, seed_of

DEVIATION = 0.02
POOL = (1 << 24) - 3  # numbers that all large tensors are cut from; a prime, so that no two rows of a tensor are alike


def write_list(path: Path, network: nn.Module, dtype: str = "BF16") -> None:
    """The list of a network that has shapes only. dtype: safetensors' word for how the numbers are kept."""
    named = {name: [dtype, list(tensor.shape)] for name, tensor in network.state_dict().items()}
    path.write_text(json.dumps(named))


def read_list(path: Path) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape). Raises ModelError."""
    try:
        return {name: (dtype, tuple(shape)) for name, (dtype, shape) in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as damaged:
        raise ModelError(f"{path}: not a list of weights to draw ({damaged}). Make the folder anew.") from damaged


class Pool:
    """Random numbers that tensors are cut from: to draw 14 billion anew would take a minute on one core."""

    def __init__(self, dtype: torch.dtype) -> None:
        numbers = torch.randn(POOL, generator=generator("cpu", "drawn weights"))
        self.numbers = numbers.mul_(DEVIATION).to(dtype)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of a name: the same whenever it is asked for."""
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=self.numbers.dtype)
        if len(shape) == 1:  # of a norm
            return torch.ones(shape, dtype=self.numbers.dtype)
        out = torch.empty(prod(shape), dtype=self.numbers.dtype)
        start, filled = seed_of(name) % POOL, 0
        while filled < len(out):
            part = self.numbers[start : start + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled, start = filled + len(part), 0
        return out.view(shape)
