"""Hugging Face PEFT as a backend: its layers and its numerics, through its public calls."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from peft.functional import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from weft.adapters.modules import layers_at
from weft.adapters.named import UNSET, NamedAdapters
from weft.adapters.recipe import Recipe
from weft.errors import ModelError

if TYPE_CHECKING:

    class Wrapper(nn.Module, BaseTunerLayer):
        """What every layer of PEFT is, and PEFT has no name for."""


class PeftAdapters(NamedAdapters):
    """Adapters injected by PEFT: the layer at PATH becomes a wrapper, with the base under `PATH.base_layer`."""

    def __init__(
        self, recipe: Recipe, network: nn.Module, paths: Sequence[str], names: Sequence[str], seed: int
    ) -> None:
        layers = layers_at(network, paths)
        super().__init__(recipe, tuple(layers), names, seed)
        recipe.check_layers(layers)
        # Made without numbers: the base's weights may not be there yet, of which DoRA's magnitudes would be computed.
        # What PEFT draws all the same must not be noticed by the run's own chance.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several names are meant
            for name in self.names:
                inject_adapter_in_model(recipe.peft_config(layers), network, adapter_name=name, low_cpu_mem_usage=True)
        self.layers = _wrappers_at(network, self.paths)
        network.requires_grad_(False)
        for wrapper in self.layers.values():
            # PEFT's wrappers are born in training mode, whatever the network's.
            base = wrapper.get_base_layer()
            wrapper.train(base.training)
            if not recipe.keeps_dtype:
                KeepDtype().watch(base, wrapper)
            for module in _inside(wrapper, recipe.tensors):
                _give_memory(module, next(base.parameters()).device)
        for name in self.names:
            recipe.complete(self.layers, name)
        # Modules and the names of their parameters, not parameters: engines replace those.
        holders = [module for wrapper in self.layers.values() for module in _inside(wrapper, recipe.tensors)]
        self._trained = [(module, key) for module in holders for key, _ in module.named_parameters(recurse=False)]
        self.in_use: str | None = self.names[-1]
        self.wanted: str | None = None
        self._switch(None)
        network.register_forward_pre_hook(self._before_forward)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Canonical name -> parameter, in network order."""
        return {key: tensor for key, tensor in self._tensors(name).items() if isinstance(tensor, nn.Parameter)}

    def fixed(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> tensor that belongs to an adapter and is not trained."""
        return {key: tensor for key, tensor in self._tensors(name).items() if not isinstance(tensor, nn.Parameter)}

    def base_layer(self, path: str) -> nn.Module:
        """The frozen layer under a path."""
        return self.layers[path].get_base_layer()

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Answer under one adapter, or with None as the bare base.

        A switch walks over every layer, so the way back to the base waits until the network is asked outside: a
        training step that uses one role again and again never switches.
        """
        assert name is None or name in self.names, f"no adapter is called '{name}', only {self.names}"
        before, self.wanted = self.wanted, name
        self._switch(name)  # at once: a recomputed block of a pending backward asks no network
        try:
            yield
        finally:
            self.wanted = before
            if before is not None:
                self._switch(before)

    def _before_forward(self, network: nn.Module, inputs: object) -> None:
        self._switch(self.wanted)

    def _switch(self, name: str | None) -> None:
        if name == self.in_use:
            return
        # PEFT's calls also freeze whatever is not in use. A parameter that is frozen while its graph waits for the
        # backward pass loses its gradient without an error, so the flags are put back.
        trained = [module.get_parameter(key) for module, key in self._trained]
        flags = [parameter.requires_grad for parameter in trained]
        for layer in self.layers.values():
            # Each of these calls walks over all weights of a layer, so only what changes is called.
            if name is not None and layer.active_adapters != [name]:
                layer.set_adapter(name)
            if layer.disable_adapters != (name is None):
                layer.enable_adapters(name is not None)
        for parameter, flag in zip(trained, flags, strict=True):
            parameter.requires_grad_(flag)
        self.in_use = name

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> every tensor of an adapter that its files or its checkpoints hold."""
        assert name in self.names, f"no adapter is called '{name}', only {self.names}"
        found: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            for kind in self.recipe.tensors:
                holder = layer.get_submodule(kind)
                assert isinstance(holder, nn.ModuleDict | nn.ParameterDict)
                if name in holder:
                    found |= _named(f"{path}.{kind}", holder[name])
        return found


@dataclass
class KeepDtype:
    """Gives a wrapper's answer the dtype of its base layer's: some of PEFT's layers answer in that of their input, and
    under autocast the network around them would then compute in another precision than without adapters."""

    dtype: torch.dtype | None = None

    def watch(self, base: nn.Module, wrapper: nn.Module) -> None:
        base.register_forward_hook(self._note)
        wrapper.register_forward_hook(self._keep)

    def _note(self, base: nn.Module, inputs: object, output: Tensor) -> None:
        self.dtype = output.dtype

    def _keep(self, wrapper: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output if output.dtype == self.dtype else output.to(self.dtype)


def without_chance(wrappers: Mapping[str, nn.Module]) -> None:
    """Keep wrappers from drawing a number in each call of training, as LoHa's and LoKr's do even without a dropout: one
    in 2^24 would leave the change out, and a rehearsal on fake tensors has no numbers."""
    for wrapper in wrappers.values():
        wrapper.register_forward_pre_hook(_rest)


def _rest(wrapper: nn.Module, inputs: object) -> None:
    wrapper.training = False  # its own flag alone; layers inside keep theirs


def _inside(wrapper: nn.Module, kinds: Sequence[str]) -> list[nn.Module]:
    """The modules of a wrapper that hold tensors of its adapters."""
    return [module for kind in kinds for module in wrapper.get_submodule(kind).modules()]


def _give_memory(module: nn.Module, device: torch.device) -> None:
    """Real parameters, in fp32: in a base's bf16 a small learning rate would move nothing. Buffers have numbers."""
    for key, parameter in module.named_parameters(recurse=False):
        assert parameter.is_meta
        empty = torch.full(parameter.shape, UNSET, device=device, dtype=torch.float32)
        module._parameters[key] = nn.Parameter(empty)
    for key, buffer in module.named_buffers(recurse=False):
        module._buffers[key] = buffer.to(device)


def _named(name: str, tensors: Tensor | nn.Module) -> dict[str, Tensor]:
    if isinstance(tensors, nn.Module):
        inside = tensors.state_dict(keep_vars=True)
        # PEFT's live modules call the magnitude a weight, its files do not.
        return {name if name.endswith("magnitude_vector") else f"{name}.{key}": t for key, t in inside.items()}
    return {name: tensors}


def _wrappers_at(network: nn.Module, paths: Sequence[str]) -> "dict[str, Wrapper]":
    """The layers that PEFT made. Raises ModelError when they are not exactly those at paths."""
    layers = {
        path: cast("Wrapper", module) for path, module in network.named_modules() if isinstance(module, BaseTunerLayer)
    }
    wrong = sorted(set(layers) ^ set(paths))
    if wrong:
        raise ModelError(
            f"PEFT adapted {len(layers)} layers where {len(paths)} were asked for, first difference '{wrong[0]}'. "
            "It matches names by their endings; use adapter.backend: native for this network."
        )
    return layers
