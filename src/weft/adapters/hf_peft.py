"""Hugging Face PEFT as a backend: its layers and its numerics, through its public calls."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from peft import LoraConfig
from peft.functional import cast_adapter_dtype, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from weft.adapters.dropout import RankDropout
from weft.adapters.lora import Lora
from weft.adapters.modules import linears_at
from weft.adapters.named import MAGNITUDE, A, B, NamedAdapters
from weft.errors import ModelError


class PeftAdapters(NamedAdapters):
    """Adapters injected by PEFT: the layer at PATH becomes a wrapper, with the base under `PATH.base_layer`."""

    def __init__(self, recipe: Lora, network: nn.Module, paths: Sequence[str], names: Sequence[str], seed: int) -> None:
        ordered = tuple(linears_at(network, paths))
        super().__init__(recipe, ordered, names, seed)
        # PEFT draws first values that `initialize` replaces; the run's own chance must not notice.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several names are meant
            for name in self.names:
                inject_adapter_in_model(peft_config(recipe, ordered), network, adapter_name=name)
                # Injection takes over the base's dtype; in bf16 a small learning rate would move nothing.
                cast_adapter_dtype(network, name)
        self.layers = _layers_at(network, ordered)
        network.requires_grad_(False)
        for path in ordered:
            # PEFT's wrappers are born in training mode, whatever the network's.
            wrapper = network.get_submodule(path)
            wrapper.train(wrapper.get_submodule("base_layer").training)
        for name in self.names:
            for parameter in self.parameters(name).values():
                parameter.requires_grad_(True)
            self._hook_dropout(name)
        self._trained = [parameter for name in self.names for parameter in self.parameters(name).values()]
        self.in_use: str | None = self.names[-1]
        self.wanted: str | None = None
        self._switch(None)
        self.initialize()
        network.register_forward_pre_hook(self._before_forward)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Canonical name -> parameter, in network order."""
        assert name in self.names, f"no adapter is called '{name}', only {self.names}"
        found = {}
        for path, layer in self.layers.items():
            found[path + A] = layer.lora_A.get_parameter(f"{name}.weight")
            found[path + B] = layer.lora_B.get_parameter(f"{name}.weight")
            if self.recipe.dora:
                found[path + MAGNITUDE] = layer.lora_magnitude_vector.get_parameter(f"{name}.weight")
        return found

    def base_weight(self, path: str) -> Tensor:
        """The frozen weight (out, in) under a path."""
        base = self.layers[path].get_base_layer()
        assert isinstance(base, nn.Linear)
        return base.weight

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
        flags = [parameter.requires_grad for parameter in self._trained]
        for layer in self.layers.values():
            # Each of these calls walks over all weights of a layer, so only what changes is called.
            if name is not None and layer.active_adapters != [name]:
                layer.set_adapter(name)
            if layer.disable_adapters != (name is None):
                layer.enable_adapters(name is not None)
        for parameter, flag in zip(self._trained, flags, strict=True):
            parameter.requires_grad_(flag)
        self.in_use = name

    def _hook_dropout(self, name: str) -> None:
        # LoraConfig knows dropout on the input only. What A puts out are the rank activations, so the other three
        # kinds stand there; B has no bias, so a zero there skips the whole layer's change.
        dropout = RankDropout(self.recipe.activation_dropout, self.recipe.rank_dropout, self.recipe.module_dropout)
        if dropout.acts:
            for layer in self.layers.values():
                layer.lora_A.get_submodule(name).register_forward_hook(partial(_thin, dropout))


def peft_config(recipe: Lora, paths: Sequence[str]) -> LoraConfig:
    """The recipe in PEFT's words, every value given: its defaults (r 8, alpha 8) are not ours."""
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.strength,  # pyright: ignore[reportArgumentType]  # annotated int, used as a float
        lora_dropout=recipe.input_dropout,
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        target_modules=list(paths),
        bias="none",
        task_type=None,
        init_lora_weights=False,
    )


def _thin(dropout: RankDropout, module: nn.Module, inputs: tuple[Tensor, ...], h: Tensor) -> Tensor:
    return dropout.thin(h) if module.training else h


def _layers_at(network: nn.Module, paths: Sequence[str]) -> dict[str, LoraLayer]:
    """The layers that PEFT made. Raises ModelError when they are not exactly those at paths."""
    layers = {path: module for path, module in network.named_modules() if isinstance(module, LoraLayer)}
    wrong = sorted(set(layers) ^ set(paths))
    if wrong:
        raise ModelError(
            f"PEFT adapted {len(layers)} layers where {len(paths)} were asked for, first difference '{wrong[0]}'. "
            "It matches names by their endings; use adapter.backend: native for this network."
        )
    return layers
