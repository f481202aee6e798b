"""Adapters of one network, each name by its own recipe, and what is trained beside them."""

from collections.abc import Mapping

from torch import nn

from weft.adapters.biases import Biases, places_of
from weft.adapters.hooked import HookedAdapters
from weft.adapters.named import Beside, NamedAdapters
from weft.adapters.recipe import Standing as Standing
from weft.adapters.whole_modules import WholeModules
from weft.errors import ConfigError, ModelError

ATTACHED = "weft_attached"  # attribute of a network that has its adapters


def attach(network: nn.Module, standings: Mapping[str, Standing], seed: int) -> NamedAdapters:
    """Put fresh adapters on the layers of a network, and freeze everything else.

    Raises ModelError for a network that has some already: adapters on adapters would be trained by nobody's rates.
    """
    assert standings, "no adapter has a name"
    if network.__dict__.get(ATTACHED):
        raise ModelError("the network has adapters already, and would be wrapped twice. Load it anew.")
    parts = {}
    for name, standing in standings.items():
        parts.setdefault(standing.recipe.carrier(), {})[name] = standing
    beside = [*_biases(network, standings), *_wholes(network, standings)]
    # Hooks first: they stand on the layers themselves, around which PEFT then puts its wrappers.
    carriers = [carrier(network, parts[carrier]) for carrier in sorted(parts, key=lambda c: c is not HookedAdapters)]
    network.__dict__[ATTACHED] = True
    network.requires_grad_(False)
    adapters = NamedAdapters(standings, carriers, seed, beside)
    for name in adapters.names:
        for parameter in adapters.parameters(name).values():
            parameter.requires_grad_(True)
    return adapters


def _wholes(network: nn.Module, standings: Mapping[str, Standing]) -> list[Beside]:
    return [WholeModules(network, standings)] if any(standing.whole for standing in standings.values()) else []


def _biases(network: nn.Module, standings: Mapping[str, Standing]) -> list[Beside]:
    """The one adapter's biases. They are looked up by the network's own names, before anything is wrapped."""
    asked = {name: standing for name, standing in standings.items() if standing.recipe.biases != "none"}
    if asked and len(standings) > 1:
        raise ConfigError(
            f"adapter.bias: the network's own biases are trained, and cannot be those of {len(standings)} adapters at "
            f"once ({', '.join(standings)}). Write adapter.bias=none."
        )
    return [Biases(name, places_of(network, own, own.recipe.biases)) for name, own in asked.items()]
