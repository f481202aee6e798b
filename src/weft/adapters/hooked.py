"""Adapters carried by Weft: a forward hook on each layer, whose own parameters and class stay as they were."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from weft.adapters.modules import layers_at
from weft.adapters.recipe import Standing

# The child of a layer that holds its adapters. Keys of the base weights do not change.
CHILD = "weft_adapters"


class Change(nn.Module, ABC):
    """What one adapter makes of the answers of one layer; its parameters are fp32."""

    ends: ClassVar[Mapping[str, str]]  # own name of a tensor -> how its canonical name goes on after the layer's path

    @abstractmethod
    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The layer's answer under this adapter, in the dtype of its own one to x."""


@dataclass
class InUse:
    """Which adapter answers; one object shared by all layers, so that a switch costs nothing."""

    name: str | None = None


class HookedAdapters:
    """A carrier of adapters as children `PATH.weft_adapters` of the layers that they change."""

    def __init__(self, network: nn.Module, standings: Mapping[str, Standing]) -> None:
        self.names = tuple(standings)
        self.in_use = InUse()
        self.layers = {name: layers_at(network, standing.paths) for name, standing in standings.items()}
        for name, standing in standings.items():
            standing.recipe.check_layers(self.layers[name])
            for layer in self.layers[name].values():
                adapted_layer(layer, self.in_use).add_module(name, standing.recipe.change(layer).train(layer.training))

    def paths_of(self, name: str) -> tuple[str, ...]:
        """The layers that an adapter stands on, in the network's own order."""
        return tuple(self.layers[name])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> every tensor of an adapter that its files or its checkpoints hold."""
        found = {}
        for path, layer in self.layers[name].items():
            change = layer.get_submodule(f"{CHILD}.{name}")
            assert isinstance(change, Change)
            found |= {path + change.ends[key]: tensor for key, tensor in change.state_dict(keep_vars=True).items()}
        return found

    def base_layer(self, path: str) -> nn.Module:
        """The frozen layer at a path."""
        return next(layers[path] for layers in self.layers.values() if path in layers)

    def answer(self, name: str | None) -> None:
        """Answer under one adapter, or with None under none of these."""
        self.in_use.name = name

    def rest(self) -> None:
        """Answer under none of these."""
        self.in_use.name = None


class AdaptedLayer(nn.ModuleDict):
    """All adapters of one layer, by name, and the hook that adds the one in use."""

    def __init__(self, in_use: InUse) -> None:
        super().__init__()
        self.in_use = in_use

    def change(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output (..., out) under the adapter in use: a forward hook."""
        name = self.in_use.name
        # Of several adapters some stand on other layers.
        return output if name is None or name not in self else self[name](layer, inputs[0], output)


def adapted_layer(layer: nn.Module, in_use: InUse) -> AdaptedLayer:
    """The child of a layer that holds its adapters, made when it is not there."""
    if CHILD not in layer._modules:
        child = AdaptedLayer(in_use).train(layer.training)
        layer.add_module(CHILD, child)
        layer.register_forward_hook(child.change)
    child = layer.get_submodule(CHILD)
    assert isinstance(child, AdaptedLayer) and child.in_use is in_use, "the network has adapters already"
    return child


def met(x: Tensor, weight: Tensor) -> Tensor:
    """x as an adapter's weight multiplies it. Autocast makes its own cast; without it, a bf16 base meets fp32 here."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
