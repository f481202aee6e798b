"""Modules that are trained whole beside an adapter, such as a classifier's head: each adapter has its own copy."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters.fused import InUse
from weft.adapters.named import UNSET, Chance
from weft.adapters.recipe import Standing
from weft.math.sharded import fill, whole

CHILD = "weft_whole"  # child of such a module that holds the copies. Keys of its own weights do not change.


class WholeModules:
    """What PEFT calls modules_to_save: while an adapter is in use its own copy answers in a module's place, and outside
    the module as it was. A copy begins as the module itself; its parameters are fp32, as those of adapters."""

    def __init__(self, network: nn.Module, standings: Mapping[str, Standing]) -> None:
        self.in_use = InUse()
        self.modules = {
            name: {path: network.get_submodule(path) for path in standing.whole} for name, standing in standings.items()
        }
        # All are copied before one of them is changed: several adapters may have copies of one module.
        made = {name: {path: _copy(own) for path, own in modules.items()} for name, modules in self.modules.items()}
        for name, copies in made.items():
            for path, copy in copies.items():
                _copies_in(self.modules[name][path], self.in_use).add_module(name, copy)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> tensor of a copy: PATH.KEY."""
        found: dict[str, Tensor] = {}
        for path, module in self.modules[name].items():
            own = module.get_submodule(f"{CHILD}.{name}").state_dict(keep_vars=True)
            found |= {f"{path}.{key}": tensor for key, tensor in own.items()}
        return found

    def begin(self, name: str, chance: Chance) -> None:
        """Begin as the network is. Of a sharded one every process must ask."""
        for module in self.modules[name].values():
            copy = module.get_submodule(f"{CHILD}.{name}").state_dict(keep_vars=True)
            for key, tensor in module.state_dict(keep_vars=True).items():
                if key in copy:
                    fill(copy[key], whole(tensor.detach()))

    def answer(self, name: str | None) -> None:
        """Let one adapter's copies answer, or with None the modules themselves."""
        self.in_use.name = name

    def rest(self) -> None:
        """Let the modules themselves answer."""
        self.in_use.name = None


class Copies(nn.ModuleDict):
    """The copies of one module, by the names of their adapters, and its forward, which asks the one in use."""

    def __init__(self, in_use: InUse) -> None:
        super().__init__()
        self.in_use = in_use


class Stands:
    """A module's forward: that of the copy in use, or its own."""

    def __init__(self, module: nn.Module, copies: Copies) -> None:
        self.module, self.copies = module, copies

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self.copies.in_use.name
        if name is not None and name in self.copies:
            return self.copies[name](*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def _copies_in(module: nn.Module, in_use: InUse) -> Copies:
    if CHILD not in module._modules:
        copies = Copies(in_use).train(module.training)
        module.add_module(CHILD, copies)
        module.__dict__["forward"] = Stands(module, copies).forward
    copies = module.get_submodule(CHILD)
    assert isinstance(copies, Copies) and copies.in_use is in_use, "the network has adapters already"
    return copies


def _copy(module: nn.Module) -> nn.Module:
    """A copy without values: while networks are read there may be none yet."""
    copy = deepcopy(module)
    for each in copy.modules():
        for key, parameter in each._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                wide = torch.promote_types(parameter.dtype, torch.float32)
                each._parameters[key] = nn.Parameter(torch.full_like(parameter, UNSET, dtype=wide))
    return copy
