"""Weft's own LoRA: a forward hook on each layer, whose own parameters and class stay as they were."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.adapters.dropout import RankDropout
from weft.adapters.lora import Lora
from weft.adapters.low_rank import FIRST_A, FIRST_B, MAGNITUDE, A, B, Product
from weft.adapters.modules import layers_at, rows_are_readable
from weft.adapters.named import UNSET, NamedAdapters
from weft.errors import ModelError

# The child of a layer that holds its adapters. Keys of the base weights do not change.
CHILD = "weft_lora"


@dataclass
class InUse:
    """Which adapter answers; one object shared by all layers, so that a switch costs nothing."""

    name: str | None = None


class NativeAdapters(NamedAdapters):
    """Adapters as children `PATH.weft_lora` of the layers they change."""

    def __init__(self, recipe: Lora, network: nn.Module, paths: Sequence[str], names: Sequence[str], seed: int) -> None:
        layers = layers_at(network, paths)
        super().__init__(recipe, tuple(layers), names, seed)
        if recipe.dora:
            _refuse_packed(layers)
        network.requires_grad_(False)
        self.in_use = InUse()
        self.layers = layers
        for layer in layers.values():
            adapted = AdaptedLayer(recipe, layer, self.names, self.in_use).train(layer.training)
            layer.add_module(CHILD, adapted)
            layer.register_forward_hook(adapted.change)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Canonical name -> parameter, in network order."""
        return {key: tensor for key, tensor in self._tensors(name).items() if isinstance(tensor, nn.Parameter)}

    def fixed(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> tensor that belongs to an adapter and is not trained."""
        return {key: tensor for key, tensor in self._tensors(name).items() if not isinstance(tensor, nn.Parameter)}

    def base_layer(self, path: str) -> nn.Module:
        """The frozen layer at a path."""
        return self.layers[path]

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Answer under one adapter, or with None as the bare base."""
        assert name is None or name in self.names, f"no adapter is called '{name}', only {self.names}"
        before, self.in_use.name = self.in_use.name, name
        try:
            yield
        finally:
            self.in_use.name = before

    def _tensors(self, name: str) -> dict[str, Tensor]:
        assert name in self.names, f"no adapter is called '{name}', only {self.names}"
        ends = {"lora_A": A, "lora_B": B, "magnitude": MAGNITUDE, "first_A": FIRST_A, "first_B": FIRST_B}
        found = {}
        for path, layer in self.layers.items():
            pair = layer.get_submodule(f"{CHILD}.{name}")
            found |= {path + ends[key]: tensor for key, tensor in pair.state_dict(keep_vars=True).items()}
        return found


class LowRank(nn.Module):
    """The weights of one adapter on one layer: A (r, in), B (out, r), and with DoRA a magnitude (out,). fp32.

    With PiSSA also their first values, which are taken away from every answer.
    """

    first_A: Tensor | None
    first_B: Tensor | None

    def __init__(self, recipe: Lora, layer: nn.Module) -> None:
        super().__init__()
        product = Product(layer)
        rank, self.scale = recipe.width(product.is_conv)
        device = next(layer.parameters()).device  # a packed layer decodes its weight whenever that is asked for
        a, b = (torch.full(shape, UNSET, device=device, dtype=torch.float32) for shape in product.shapes(rank))
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.magnitude = nn.Parameter(b[:, 0].clone()) if recipe.dora else None
        pissa = recipe.init == "pissa"
        self.register_buffer("first_A", a.clone() if pissa else None)
        self.register_buffer("first_B", b.clone() if pissa else None)


class AdaptedLayer(nn.ModuleDict):
    """All adapters of one layer, by name, and the hook that adds the one in use."""

    def __init__(self, recipe: Lora, layer: nn.Module, names: Sequence[str], in_use: InUse) -> None:
        super().__init__({name: LowRank(recipe, layer) for name in names})
        self.in_use = in_use
        self.input_dropout = recipe.input_dropout
        self.dropout = RankDropout(recipe.activation_dropout, recipe.rank_dropout, recipe.module_dropout)

    def change(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The layer's output (..., out) under the adapter in use: a forward hook."""
        if self.in_use.name is None:
            return output
        pair = self[self.in_use.name]
        assert isinstance(pair, LowRank)
        x = inputs[0]
        if self.input_dropout or not torch.is_autocast_enabled(x.device.type):
            # Autocast makes its own cast; without it, a bf16 base meets fp32 adapters here.
            x = x.to(pair.lora_A.dtype)
        if pair.magnitude is not None:
            assert isinstance(layer, nn.Linear)
            return (output + self.dora_change(pair, layer, x, output)).to(output.dtype)
        return (output + self.low_rank(pair, Product(layer), self.drop_input(x))).to(output.dtype)

    def drop_input(self, x: Tensor) -> Tensor:
        if self.input_dropout and self.training:
            return functional.dropout(x, self.input_dropout)
        return x

    def low_rank(self, pair: LowRank, product: Product, x: Tensor) -> Tensor:
        """scale B A x (..., out), with PiSSA scale (B A - B0 A0) x in the form that `without_first` explains."""
        a = pair.lora_A if pair.first_A is None else pair.lora_A - pair.first_A
        h = product.down(x, a)  # (..., r)
        if self.training and self.dropout.acts:
            h = product.ranks_back(self.dropout.thin(product.ranks_last(h)))
        if pair.scale != 1:
            # On r numbers a token in place of out: exact for powers of two, else equal to rounding.
            h = h * pair.scale
        change = product.up(h, pair.lora_B)
        if pair.first_A is None or pair.first_B is None:
            return change
        first = product.down(x, pair.first_A)
        return change + product.up(first * pair.scale if pair.scale != 1 else first, pair.lora_B - pair.first_B)

    def dora_change(self, pair: LowRank, linear: nn.Linear, x: Tensor, output: Tensor) -> Tensor:
        """What DoRA adds: (g - 1) W x + g scale B A x, g = m / ||W + scale B A||. arXiv:2402.09353, section 4.3.

        The norm is a constant for the gradient, as the paper advises and PEFT does.
        """
        assert pair.magnitude is not None
        with torch.no_grad():
            whole = linear.weight.to(x.dtype) + pair.scale * (pair.lora_B @ pair.lora_A).to(x.dtype)
            norm = torch.linalg.norm(whole, dim=1)
        g = pair.magnitude / norm
        if self.input_dropout and self.training:
            x = self.drop_input(x)
            base = functional.linear(x, linear.weight.to(x.dtype))
        else:
            base = output if linear.bias is None else output - linear.bias
        return (g - 1) * base + g * self.low_rank(pair, Product(linear), x)


def _refuse_packed(layers: Mapping[str, nn.Module]) -> None:
    for path, layer in layers.items():
        if not rows_are_readable(layer):
            raise ModelError(
                f"adapter.dora: the weight of '{path}' is packed ({type(layer).__name__}), and native DoRA needs its "
                "rows. Use backend: peft, or dora: false."
            )
