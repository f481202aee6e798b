"""Biases of the network itself that are trained beside a LoRA, as PEFT's `bias` means it."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from weft.adapters.fused import InUse
from weft.adapters.named import Chance
from weft.adapters.recipe import Standing
from weft.errors import ModelError
from weft.math.sharded import fill, whole

FROZEN = "weft_frozen_"  # how the buffer with a bias's first values is called, before the bias's own name
Place = tuple[nn.Module, str]  # a module and the name of its bias


class Biases:
    """The network's own parameters of these names are trained, under an adapter's name. Outside of it, and for that
    time alone, each module has the bias that it had."""

    def __init__(self, name: str, places: Mapping[str, Place]) -> None:
        self.name, self.places = name, dict(places)
        self.in_use = InUse()
        for module, key in self.places.values():
            bias = module._parameters[key]
            assert bias is not None
            module._parameters[key] = nn.Parameter(bias.detach().to(torch.promote_types(bias.dtype, torch.float32)))
            module.register_buffer(FROZEN + key, bias.detach().clone(), persistent=False)
            module.register_forward_pre_hook(partial(self._rest, key))
            module.register_forward_hook(partial(self._restore, key), always_call=True)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> bias: its own in the network."""
        own = self.places if name == self.name else {}
        return {path: self._trained(module, key) for path, (module, key) in own.items()}

    def begin(self, name: str, chance: Chance) -> None:
        """They begin as they are, which is kept. Of a sharded network every process must ask."""
        for module, key in self.places.values() if name == self.name else ():
            fill(module.get_buffer(FROZEN + key), whole(self._trained(module, key).detach()))

    def answer(self, name: str | None) -> None:
        """Answer with what was learned, or with None as it was."""
        self.in_use.name = name

    def rest(self) -> None:
        """Answer as it was."""
        self.in_use.name = None

    def _trained(self, module: nn.Module, key: str) -> nn.Parameter:
        bias = module._parameters[key]
        assert bias is not None
        return bias

    def _rest(self, key: str, module: nn.Module, inputs: object) -> None:
        if self.in_use.name is None:
            module.__dict__[f"{FROZEN}aside_{key}"] = module._parameters[key]
            module._parameters[key] = module._buffers[FROZEN + key]  # type: ignore[assignment]  # a tensor will do

    def _restore(self, key: str, module: nn.Module, inputs: object, output: object) -> None:
        aside = module.__dict__.pop(f"{FROZEN}aside_{key}", None)
        if aside is not None:
            module._parameters[key] = aside


def places_of(network: nn.Module, standing: Standing, kind: str) -> dict[str, Place]:
    """Name of a bias -> where it is. kind: all, every parameter that has bias in its name; lora_only, those of the
    layers that have an adapter. What is trained whole has its own.

    Raises ModelError where there is none.
    """
    found: dict[str, Place] = {}
    for path, module in network.named_modules():
        if any(path == own or path.startswith(f"{own}.") for own in standing.whole):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            place = f"{path}.{key}" if path else key
            wanted = "bias" in key if kind == "all" else key == "bias" and path in standing.paths
            if wanted and parameter.is_floating_point():
                found[place] = (module, key)
    if not found:
        raise ModelError(f"adapter.bias: {kind} trains biases, and there is none here. Write adapter.bias=none.")
    return found
