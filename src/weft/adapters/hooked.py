"""Adapters carried by Weft: a forward hook on each layer, whose own parameters and class stay as they were."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weft.adapters.fused import InUse, NarrowCopies, fuse, fused
from weft.adapters.modules import layers_at
from weft.adapters.named import Chance, begin_layers
from weft.adapters.recipe import Standing
from weft.projection import CHANGE, FORWARD, LowRank, Opaque, counted

# The child of a layer that holds its adapters. Keys of the base weights do not change.
CHILD = "weft_adapters"


class Change(nn.Module, ABC):
    """What one adapter makes of the answers of one layer; its parameters are fp32."""

    ends: ClassVar[Mapping[str, str]]  # own name of a tensor -> how its canonical name goes on after the layer's path
    plain = False  # whether it is a LoRA that `told` can tell, where no dropout acts

    @abstractmethod
    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The layer's answer under this adapter, in the dtype of its own one to x."""

    def told(self) -> LowRank | Opaque:
        """What it adds at the moment."""
        return Opaque(f"a change by {type(self).__name__} is more than two factors")


class HookedAdapters:
    """A carrier of adapters as children `PATH.weft_adapters` of the layers that they change."""

    def __init__(self, network: nn.Module, standings: Mapping[str, Standing]) -> None:
        self.names = tuple(standings)
        self.recipes = {name: standing.recipe for name, standing in standings.items()}
        self.in_use = InUse()
        self.layers = {name: layers_at(network, standing.paths) for name, standing in standings.items()}
        for name, standing in standings.items():
            standing.recipe.check_layers(self.layers[name])
            for layer in self.layers[name].values():
                adapted_layer(layer, self.in_use).add(name, standing.recipe.change(layer).train(layer.training), layer)
        self.copies = {name: NarrowCopies() for name in standings}
        self._plain: dict[str, list[Any]] = {
            name: [change for layer in layers.values() if (change := layer.get_submodule(f"{CHILD}.{name}")).plain]
            for name, layers in self.layers.items()
        }
        network.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, network: nn.Module, inputs: object) -> None:
        name = self.in_use.name
        if name is not None and self._plain[name] and not torch.compiler.is_compiling():
            self.copies[name].renew(self._plain[name])

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

    def begin(self, name: str, chance: Chance) -> None:
        """Give an adapter its first values."""
        begin_layers(self, self.recipes[name], name, chance)

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

    def add(self, name: str, change: Change, layer: nn.Module) -> None:
        """One more adapter of the layer."""
        self.add_module(name, change)
        if change.plain and FORWARD not in layer.__dict__:
            fuse(layer, FusedLinear(layer, self).forward)

    def told(self) -> LowRank | Opaque | None:
        """What the adapter in use adds; None where it stands on other layers."""
        name = self.in_use.name
        if name is None or name not in self:
            return None
        change = self[name]
        assert isinstance(change, Change)
        return change.told()

    def hook(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """A forward hook. Where the layer answers by a forward of ours, that has added the change; another's may stand
        in its place."""
        own = layer.__dict__
        answered = FORWARD in own and own.get("forward") is own[FORWARD]
        return output if answered else self.change(layer, inputs, output)

    def change(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output (..., out) under the adapter in use."""
        name = self.in_use.name
        # Of several adapters some stand on other layers.
        return output if name is None or name not in self else self[name](layer, inputs[0], output)


def adapted_layer(layer: nn.Module, in_use: InUse) -> AdaptedLayer:
    """The child of a layer that holds its adapters, made when it is not there."""
    if CHILD not in layer._modules:
        child = AdaptedLayer(in_use).train(layer.training)
        layer.add_module(CHILD, child)
        layer.register_forward_hook(child.hook)
        counted(layer)
        layer.__dict__[CHANGE] = child.told
    child = layer.get_submodule(CHILD)
    assert isinstance(child, AdaptedLayer) and child.in_use is in_use, "the network has adapters already"
    return child


class FusedLinear:
    """The forward of a layer on which plain LoRAs stand, and perhaps others."""

    def __init__(self, layer: nn.Module, adapted: AdaptedLayer) -> None:
        self.layer, self.adapted = layer, adapted

    def forward(self, x: Tensor) -> Tensor:
        answer, bare = fused(self.layer, x)
        if answer is not None:
            return answer
        output = type(self.layer).forward(self.layer, x)
        return output if bare else self.adapted.change(self.layer, (x,), output)
