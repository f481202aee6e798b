"""Adapters of one network, each name by its own recipe."""

from collections.abc import Mapping

from torch import nn

from weft.adapters.hooked import HookedAdapters
from weft.adapters.named import NamedAdapters
from weft.adapters.recipe import Standing as Standing


def attach(network: nn.Module, standings: Mapping[str, Standing], seed: int) -> NamedAdapters:
    """Put fresh adapters on the layers of a network, and freeze everything else."""
    assert standings, "no adapter has a name"
    parts = {}
    for name, standing in standings.items():
        parts.setdefault(standing.recipe.carrier(), {})[name] = standing
    # Hooks first: they stand on the layers themselves, around which PEFT then puts its wrappers.
    carriers = [carrier(network, parts[carrier]) for carrier in sorted(parts, key=lambda c: c is not HookedAdapters)]
    network.requires_grad_(False)
    adapters = NamedAdapters(standings, carriers, seed)
    for name in adapters.names:
        for parameter in adapters.parameters(name).values():
            parameter.requires_grad_(True)
    return adapters
