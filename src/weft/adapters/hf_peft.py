"""Hugging Face PEFT as a backend: its layers and its numerics, through its public calls."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.functional import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from weft.adapters.fused import Factors, InUse, NarrowCopies, added, fuse, fused, told
from weft.adapters.modules import layers_at
from weft.adapters.named import UNSET, Chance, begin_layers
from weft.adapters.recipe import Recipe, Standing
from weft.errors import ModelError
from weft.projection import CHANGE, LowRank, Opaque, counted

if TYPE_CHECKING:

    class Wrapper(nn.Module, BaseTunerLayer):
        """What every layer of PEFT is, and PEFT has no name for."""


class PeftAdapters:
    """A carrier of adapters injected by PEFT: the layer at PATH becomes a wrapper, with the base under
    `PATH.base_layer`. Adapters of one kind share a wrapper; those of another kind have one around it."""

    def __init__(self, network: nn.Module, standings: Mapping[str, Standing]) -> None:
        self.names = tuple(standings)
        self.recipes = {name: standing.recipe for name, standing in standings.items()}
        self.layers = {name: layers_at(network, standing.paths) for name, standing in standings.items()}
        for name, recipe in self.recipes.items():
            recipe.check_layers(self.layers[name])
        self._inject(network)
        self.wrappers = {name: _wrappers_of(network, name, recipe) for name, recipe in self.recipes.items()}
        self._shared: dict[int, Shared] = {}
        self._now = InUse()
        for name, recipe in self.recipes.items():
            _check_paths(list(self.wrappers[name]), list(self.layers[name]))
            for wrapper in self.wrappers[name].values():
                self._shared.setdefault(id(wrapper), Shared(wrapper, self._now)).recipes[name] = recipe
        for shared in self._shared.values():
            shared.begin()
        for name, recipe in self.recipes.items():
            recipe.complete(self.wrappers[name], name)
        for shared in self._shared.values():
            shared.tell()
        # What a switch goes through: wrappers that need nothing of PEFT's own forward follow by themselves.
        self._switched = [shared for shared in self._shared.values() if not shared.follows]
        self._factors = {
            name: [f for shared in self._shared.values() if (f := shared.factors.get(name))] for name in self.names
        }
        self.copies = {name: NarrowCopies() for name in self.names}
        # Modules and the names of their parameters, not parameters: engines replace those.
        holders = [module for shared in self._shared.values() for module in shared.holders()]
        self._trained = [(module, key) for module in holders for key, _ in module.named_parameters(recurse=False)]
        self.in_use: str | None = self.names[-1]
        self.wanted: str | None = None
        self._switch(None)
        network.register_forward_pre_hook(self._before_forward)

    def _inject(self, network: nn.Module) -> None:
        # Made without numbers: the base's weights may not be there yet, of which DoRA's magnitudes would be computed.
        # What PEFT draws all the same must not be noticed by the run's own chance.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several names are meant
            for name, recipe in self.recipes.items():
                config = recipe.peft_config(self.layers[name])
                inject_adapter_in_model(config, network, adapter_name=name, low_cpu_mem_usage=True)

    def paths_of(self, name: str) -> tuple[str, ...]:
        """The layers that an adapter stands on, in the network's own order."""
        return tuple(self.layers[name])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> every tensor of an adapter that its files or its checkpoints hold."""
        found: dict[str, Tensor] = {}
        for path, wrapper in self.wrappers[name].items():
            for kind in self.recipes[name].tensors:
                holder = wrapper.get_submodule(kind)
                assert isinstance(holder, nn.ModuleDict | nn.ParameterDict)
                if name in holder:
                    found |= _named(f"{path}.{kind}", holder[name])
        return found

    def base_layer(self, path: str) -> nn.Module:
        """The frozen layer under a path."""
        return next(layers[path] for layers in self.layers.values() if path in layers)

    def begin(self, name: str, chance: Chance) -> None:
        """Give an adapter its first values."""
        begin_layers(self, self.recipes[name], name, chance)

    def answer(self, name: str | None) -> None:
        """Answer under one adapter, or with None under none of these, from now on: a recomputed block of a pending
        backward asks no network."""
        self.wanted = name
        self._switch(name)

    def rest(self) -> None:
        """Answer under none of these when the network is next asked. A switch walks over every layer: a training step
        that uses one role again and again, and nothing else between, never switches."""
        self.wanted = None

    def _before_forward(self, network: nn.Module, inputs: object) -> None:
        self._switch(self.wanted)
        name = self.in_use
        if name is not None and self._factors[name] and not torch.compiler.is_compiling():
            self.copies[name].renew(self._factors[name])

    def _switch(self, name: str | None) -> None:
        if name == self.in_use:
            return
        self.in_use = self._now.name = name
        if not self._switched:
            return
        # PEFT's calls also freeze whatever is not in use. A parameter that is frozen while its graph waits for the
        # backward pass loses its gradient without an error, so the flags are put back.
        trained = [module.get_parameter(key) for module, key in self._trained]
        flags = [parameter.requires_grad for parameter in trained]
        for shared in self._switched:
            shared.answer(name)
        for parameter, flag in zip(trained, flags, strict=True):
            parameter.requires_grad_(flag)


@dataclass
class Shared:
    """A wrapper, and those of the adapters that stand in it; all are of one kind."""

    wrapper: "Wrapper"
    now: InUse
    recipes: dict[str, Recipe] = field(default_factory=dict)
    factors: dict[str, Factors] = field(default_factory=dict)  # of those that are plain LoRAs

    @property
    def follows(self) -> bool:
        """Whether it answers under each of them without PEFT's forward."""
        return len(self.factors) == len(self.recipes) and not any(recipe.drops for recipe in self.recipes.values())

    def holders(self) -> list[nn.Module]:
        """The modules that hold tensors of its adapters."""
        (kinds,) = {recipe.tensors for recipe in self.recipes.values()}
        return [module for kind in kinds for module in self.wrapper.get_submodule(kind).modules()]

    def begin(self) -> None:
        """Give a fresh wrapper memory, and what it lacks."""
        base = self.wrapper.get_base_layer()
        self.wrapper.train(base.training)  # PEFT's wrappers are born in training mode, whatever the network's
        if not next(iter(self.recipes.values())).keeps_dtype:
            KeepDtype().watch(base, self.wrapper)
        for module in self.holders():
            _give_memory(module, next(base.parameters()).device)

    def tell(self) -> None:
        """Let the wrapper tell what its adapters add, and multiply with those that are plain LoRAs."""
        for name, recipe in self.recipes.items():
            factors = recipe.factors(self.wrapper, name)
            if factors is not None:
                self.factors[name] = factors
        vars(self.wrapper)[CHANGE] = self.told
        if self.factors:
            fuse(self.wrapper, FusedWrapper(self).forward)

    def told(self) -> LowRank | Opaque | None:
        """What the adapter in use adds, here or on a layer inside the wrapper."""
        own = self.own()
        tell: Any = self.wrapper.base_layer.__dict__.get(CHANGE)
        inside: LowRank | Opaque | None = tell() if tell else None
        return inside if own is None else own if inside is None else Opaque("two adapters answer at once")

    def own(self) -> LowRank | Opaque | None:
        """What the adapter in use adds here; None where it stands elsewhere."""
        name = self.now.name
        if name is None or name not in self.recipes:
            return None
        factors, recipe = self.factors.get(name), self.recipes[name]
        if factors is None:
            return Opaque(f"a {recipe.kind} that is more than two factors, or not to be fused")
        return Opaque("a dropout acts") if self.wrapper.training and recipe.drops else told(factors)

    def answer(self, name: str | None) -> None:
        """Let one of its adapters answer; none for a name that is not here."""
        here = name in self.recipes
        # Each of these calls walks over all weights of a layer, so only what changes is called.
        if here and name is not None and self.wrapper.active_adapters != [name]:
            self.wrapper.set_adapter(name)
        if self.wrapper.disable_adapters == here:
            self.wrapper.enable_adapters(here)


class FusedWrapper:
    """The forward of a wrapper in which plain LoRAs stand, and perhaps others."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        wrapper = self.shared.wrapper
        answer, bare = fused(wrapper, x)
        if answer is not None:
            return answer
        if not self.shared.follows:
            return type(wrapper).forward(wrapper, x)
        base = cast(nn.Module, wrapper.base_layer)  # perhaps another wrapper
        output, own = base(x), None if bare else self.shared.own()
        return added(x, output, own) if isinstance(own, LowRank) else output


@dataclass
class KeepDtype:
    """Gives a wrapper's answer the dtype of its base layer's: some of PEFT's layers answer in that of their input, and
    under autocast the network around them would then compute in another precision than without adapters."""

    dtype: torch.dtype | None = None

    def watch(self, base: nn.Module, wrapper: nn.Module) -> None:
        base.register_forward_hook(self._note)
        wrapper.register_forward_hook(self._keep)
        counted(base)
        counted(wrapper)

    def _note(self, base: nn.Module, inputs: object, output: Tensor) -> None:
        self.dtype = output.dtype

    def _keep(self, wrapper: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output if output.dtype == self.dtype else output.to(self.dtype)


def without_chance(wrappers: Mapping[str, nn.Module]) -> None:
    """Keep wrappers from drawing a number in each call of training, as LoHa's and LoKr's do even without a dropout: one
    in 2^24 would leave the change out, and a rehearsal on fake tensors has no numbers."""
    for wrapper in wrappers.values():
        wrapper.register_forward_pre_hook(_rest)
        counted(wrapper)


def _rest(wrapper: nn.Module, inputs: object) -> None:
    wrapper.training = False  # its own flag alone; layers inside keep theirs


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


def _wrappers_of(network: nn.Module, name: str, recipe: Recipe) -> "dict[str, Wrapper]":
    """Path of a layer -> the wrapper in which it has an adapter of this name."""
    return {
        path.replace(".base_layer", ""): cast("Wrapper", module)
        for path, module in network.named_modules()
        if isinstance(module, BaseTunerLayer) and _has(cast("Wrapper", module), name, recipe)
    }


def _has(wrapper: "Wrapper", name: str, recipe: Recipe) -> bool:
    holders = [wrapper._modules[kind] for kind in recipe.tensors if kind in wrapper._modules]
    return any(isinstance(holder, nn.ModuleDict | nn.ParameterDict) and name in holder for holder in holders)


def _check_paths(found: Sequence[str], asked: Sequence[str]) -> None:
    """Raises ModelError when PEFT adapted other layers than it was asked to."""
    wrong = sorted(set(found) ^ set(asked))
    if wrong:
        raise ModelError(
            f"PEFT adapted {len(found)} layers where {len(asked)} were asked for, first difference '{wrong[0]}'. "
            "It matches names by their endings; use adapter.backend: native for this network."
        )
