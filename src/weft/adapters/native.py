"""Weft's own LoRA: a forward hook on each linear layer, whose own parameters and class stay as they were."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.adapters.dropout import RankDropout
from weft.adapters.lora import Lora
from weft.adapters.modules import linears_at
from weft.adapters.named import MAGNITUDE, A, B, NamedAdapters
from weft.errors import ModelError

# The child of a linear layer that holds its adapters. Keys of the base weights do not change.
CHILD = "weft_lora"


@dataclass
class InUse:
    """Which adapter answers; one object shared by all layers, so that a switch costs nothing."""

    name: str | None = None


class NativeAdapters(NamedAdapters):
    """Adapters as children `PATH.weft_lora` of the layers they change."""

    def __init__(self, recipe: Lora, network: nn.Module, paths: Sequence[str], names: Sequence[str], seed: int) -> None:
        linears = linears_at(network, paths)
        super().__init__(recipe, tuple(linears), names, seed)
        if recipe.dora:
            _refuse_packed(linears)
        network.requires_grad_(False)
        self.in_use = InUse()
        self.linears = linears
        for linear in linears.values():
            adapted = AdaptedLinear(recipe, linear, self.names, self.in_use).train(linear.training)
            linear.add_module(CHILD, adapted)
            linear.register_forward_hook(adapted.change)
        self.initialize()

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Canonical name -> parameter, in network order."""
        assert name in self.names, f"no adapter is called '{name}', only {self.names}"
        found = {}
        for path, linear in self.linears.items():
            pair = linear.get_submodule(f"{CHILD}.{name}")
            suffixes = {"lora_A": A, "lora_B": B, "magnitude": MAGNITUDE}
            found |= {path + suffixes[key]: parameter for key, parameter in pair.named_parameters()}
        return found

    def base_weight(self, path: str) -> Tensor:
        """The frozen weight (out, in) under a path."""
        return self.linears[path].weight

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Answer under one adapter, or with None as the bare base."""
        assert name is None or name in self.names, f"no adapter is called '{name}', only {self.names}"
        before, self.in_use.name = self.in_use.name, name
        try:
            yield
        finally:
            self.in_use.name = before


class LowRank(nn.Module):
    """The weights of one adapter on one layer: A (r, in), B (out, r), and with DoRA a magnitude (out,). fp32."""

    def __init__(self, rank: int, linear: nn.Linear, dora: bool) -> None:
        super().__init__()
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, linear.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device, dtype=torch.float32))
        self.magnitude = nn.Parameter(torch.ones(linear.out_features, device=device)) if dora else None


class AdaptedLinear(nn.ModuleDict):
    """All adapters of one linear layer, by name, and the hook that adds the one in use."""

    def __init__(self, recipe: Lora, linear: nn.Linear, names: Sequence[str], in_use: InUse) -> None:
        super().__init__({name: LowRank(recipe.rank, linear, recipe.dora) for name in names})
        self.in_use = in_use
        self.scale = recipe.scale
        self.input_dropout = recipe.input_dropout
        self.dropout = RankDropout(recipe.activation_dropout, recipe.rank_dropout, recipe.module_dropout)

    def change(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output (..., out) under the adapter in use: a forward hook."""
        if self.in_use.name is None:
            return output
        pair = self[self.in_use.name]
        assert isinstance(pair, LowRank) and isinstance(linear, nn.Linear)
        x = inputs[0]
        if self.input_dropout or not torch.is_autocast_enabled(x.device.type):
            # Autocast makes its own cast; without it, a bf16 base meets fp32 adapters here.
            x = x.to(pair.lora_A.dtype)
        if pair.magnitude is not None:
            return (output + self.dora_change(pair, linear, x, output)).to(output.dtype)
        return (output + self.low_rank(pair, self.drop_input(x))).to(output.dtype)

    def drop_input(self, x: Tensor) -> Tensor:
        if self.input_dropout and self.training:
            return functional.dropout(x, self.input_dropout)
        return x

    def low_rank(self, pair: LowRank, x: Tensor) -> Tensor:
        """scale B A x (..., out)."""
        h = functional.linear(x, pair.lora_A)  # (..., r)
        if self.training and self.dropout.acts:
            h = self.dropout.thin(h)
        if self.scale != 1:
            # On r numbers a token in place of out: exact for powers of two, else equal to rounding.
            h = h * self.scale
        return functional.linear(h, pair.lora_B)

    def dora_change(self, pair: LowRank, linear: nn.Linear, x: Tensor, output: Tensor) -> Tensor:
        """What DoRA adds: (g - 1) W x + g scale B A x, g = m / ||W + scale B A||. arXiv:2402.09353, section 4.3.

        The norm is a constant for the gradient, as the paper advises and PEFT does.
        """
        assert pair.magnitude is not None
        with torch.no_grad():
            whole = linear.weight.to(x.dtype) + self.scale * (pair.lora_B @ pair.lora_A).to(x.dtype)
            norm = torch.linalg.norm(whole, dim=1)
        g = pair.magnitude / norm
        if self.input_dropout and self.training:
            x = self.drop_input(x)
            base = functional.linear(x, linear.weight.to(x.dtype))
        else:
            base = output if linear.bias is None else output - linear.bias
        return (g - 1) * base + g * self.low_rank(pair, x)


def _refuse_packed(linears: Mapping[str, nn.Linear]) -> None:
    for path, linear in linears.items():
        if linear.weight.shape != (linear.out_features, linear.in_features):
            raise ModelError(
                f"adapter.dora: the weight of '{path}' is packed ({type(linear).__name__}), and native DoRA needs its "
                "rows. Use backend: peft, or dora: false."
            )
