"""A network that is trained itself, under the name of the one adapter that it has none of."""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from weft.adapters.named import Chance
from weft.adapters.recipe import Standing
from weft.errors import ConfigError


class PlainNetwork:
    """A carrier of nothing: no hook, no wrapper, no child. Whoever is in use, the network answers as it stands."""

    def __init__(self, network: nn.Module, standings: Mapping[str, Standing]) -> None:
        self.names = tuple(standings)
        self.network = network
        if len(self.names) > 1:
            raise ConfigError(
                f"adapter.kind: with kind none the network itself is trained, and it cannot be {len(self.names)} roles "
                f"({', '.join(self.names)}) at once. Write adapter.kind=lora."
            )

    def paths_of(self, name: str) -> tuple[str, ...]:
        """No layer has an adapter."""
        return ()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The network's own parameters, and what else its files hold, under their own names."""
        parameters = dict(self.network.named_parameters())
        shared = {id(parameter) for parameter in parameters.values()}
        rest = self.network.state_dict(keep_vars=True)
        return {**parameters, **{key: tensor for key, tensor in rest.items() if id(tensor) not in shared}}

    def base_layer(self, path: str) -> nn.Module:
        raise KeyError(path)

    def begin(self, name: str, chance: Chance) -> None:
        """It has its values."""

    def answer(self, name: str | None) -> None:
        """The network answers as it stands."""

    def rest(self) -> None:
        """The network answers as it stands."""


def described(network: nn.Module) -> dict[str, Any]:
    """A network's config.json, from which transformers builds the same again."""
    assert isinstance(network, PreTrainedModel), "only networks of transformers are written as such"
    config = json.loads(network.config.to_json_string())
    return {**config, "architectures": [type(network).__name__]}
