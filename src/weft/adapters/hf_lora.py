"""LoRA on PEFT's layers: its config, and what PEFT's layers lack."""

import re
from collections.abc import Mapping
from functools import partial

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from weft.adapters.dropout import RankDropout
from weft.adapters.fused import Narrow, Strength
from weft.adapters.lora import Lora
from weft.adapters.low_rank import Product


def lora_config(recipe: Lora, layers: Mapping[str, nn.Module]) -> LoraConfig:
    """The recipe in PEFT's words, every value given: its defaults (r 8, alpha 8) are not ours."""
    convolutions = [f"^{re.escape(path)}" for path, layer in layers.items() if Product(layer).is_conv]
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.strength,  # pyright: ignore[reportArgumentType]  # annotated int, used as a float
        rank_pattern=dict.fromkeys(convolutions, recipe.conv_rank),
        alpha_pattern=dict.fromkeys(convolutions, recipe.conv_alpha or recipe.conv_rank),
        lora_dropout=recipe.input_dropout,
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        target_modules=list(layers),
        bias="none",
        task_type=None,
        init_lora_weights=False,
    )


def complete(recipe: Lora, wrappers: Mapping[str, nn.Module], name: str) -> None:
    """Hook the dropouts that LoraConfig has not, and put PiSSA's factors in place of plain ones."""
    dropout = RankDropout(recipe.activation_dropout, recipe.rank_dropout, recipe.module_dropout)
    for wrapper in wrappers.values():
        assert isinstance(wrapper, LoraLayer)
        product = Product(wrapper.get_base_layer())
        if recipe.init == "pissa":
            wrapper.lora_A[name] = DownTwice(product, wrapper.lora_A.get_parameter(f"{name}.weight"))
            wrapper.lora_B[name] = UpApart(product, wrapper.lora_B.get_parameter(f"{name}.weight"))
        if dropout.acts:
            # LoraConfig knows dropout on the input only. What A puts out are the rank activations, so the other three
            # kinds stand there; B has no bias, so a zero there skips the whole layer's change.
            wrapper.lora_A.get_submodule(name).register_forward_hook(partial(_thin, dropout, product))


class PeftFactors:
    """A and B of one LoRA in a wrapper of PEFT."""

    def __init__(self, wrapper: LoraLayer, name: str) -> None:
        self.wrapper, self.name = wrapper, name
        self.narrow: Narrow | None = None
        self.strength = Strength(wrapper.scaling[name])

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B as they are at the moment."""
        a, b = (factors._modules[self.name] for factors in (self.wrapper.lora_A, self.wrapper.lora_B))
        assert a is not None and b is not None
        return a._parameters["weight"], b._parameters["weight"]  # pyright: ignore[reportReturnType]


class Scales(dict[str, float]):
    """PEFT's scales of a wrapper, by name: who sets one, as PEFT's own calls do, sets that which is multiplied with."""

    def __init__(self, scales: Mapping[str, float]) -> None:
        super().__init__(scales)
        self.strengths: dict[str, Strength] = {}

    def __setitem__(self, name: str, scale: float) -> None:
        super().__setitem__(name, scale)
        if name in self.strengths:
            self.strengths[name].set(scale)


def factors_in(wrapper: nn.Module, name: str) -> PeftFactors | None:
    """A and B of one LoRA on a linear layer; None where PEFT has a forward of its own for the layer."""
    if type(wrapper) is not Linear or not isinstance(wrapper.get_base_layer(), nn.Linear):
        return None
    factors = PeftFactors(wrapper, name)
    scales = wrapper.scaling if isinstance(wrapper.scaling, Scales) else Scales(wrapper.scaling)
    scales.strengths[name] = factors.strength
    wrapper.scaling = scales
    return factors


class DownTwice(nn.Module):
    """PiSSA's A: x -> ((A - A0) x, A0 x) side by side along the ranks. See `without_first` for the formula."""

    first: Tensor

    def __init__(self, product: Product, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("first", weight.detach().clone())
        self.multiply = product.down
        self.ranks = 1 if product.is_conv else -1

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.multiply(x, self.weight - self.first), self.multiply(x, self.first)], self.ranks)


class UpApart(nn.Module):
    """PiSSA's B: (h, h0) -> B h + (B - B0) h0, which is exactly nothing while A and B are the first ones."""

    first: Tensor

    def __init__(self, product: Product, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("first", weight.detach().clone())
        self.multiply = product.up
        self.ranks = 1 if product.is_conv else -1

    def forward(self, h: Tensor) -> Tensor:
        moved, first = h.chunk(2, self.ranks)
        return self.multiply(moved, self.weight) + self.multiply(first, self.weight - self.first)


def _thin(dropout: RankDropout, product: Product, module: nn.Module, inputs: tuple[Tensor, ...], h: Tensor) -> Tensor:
    return product.ranks_back(dropout.thin(product.ranks_last(h))) if module.training else h
