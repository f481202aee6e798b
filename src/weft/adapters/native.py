"""Weft's own LoRA: what a layer's hook adds to its answer."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.adapters.dropout import RankDropout
from weft.adapters.fused import Narrow, Strength, met, told
from weft.adapters.hooked import Change
from weft.adapters.lora import Lora
from weft.adapters.low_rank import FIRST_A, FIRST_B, MAGNITUDE, A, B, Product
from weft.adapters.modules import rows_are_readable
from weft.adapters.named import UNSET
from weft.errors import ModelError
from weft.projection import LowRank as Told
from weft.projection import Opaque


class LowRank(Change):
    """One LoRA on one layer: A (r, in), B (out, r), and with DoRA a magnitude (out,).

    With PiSSA also their first values, which are taken away from every answer.
    """

    ends: ClassVar[Mapping[str, str]] = {
        "lora_A": A, "lora_B": B, "magnitude": MAGNITUDE, "first_A": FIRST_A, "first_B": FIRST_B
    }  # fmt: skip
    first_A: Tensor | None
    first_B: Tensor | None

    def __init__(self, recipe: Lora, layer: nn.Module) -> None:
        super().__init__()
        product = Product(layer)
        rank, scale = recipe.width(product.is_conv)
        self.strength = Strength(scale)
        self.narrow: Narrow | None = None
        self.plain = recipe.is_plain and not product.is_conv
        device = next(layer.parameters()).device  # a packed layer decodes its weight whenever that is asked for
        a, b = (torch.full(shape, UNSET, device=device, dtype=torch.float32) for shape in product.shapes(rank))
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(b)
        self.magnitude = nn.Parameter(b[:, 0].clone()) if recipe.dora else None
        pissa = recipe.init == "pissa"
        self.register_buffer("first_A", a.clone() if pissa else None)
        self.register_buffer("first_B", b.clone() if pissa else None)
        self.input_dropout = recipe.input_dropout
        self.dropout = RankDropout(recipe.activation_dropout, recipe.rank_dropout, recipe.module_dropout)

    @property
    def scale(self) -> float:
        """The factor before B A."""
        return self.strength.number

    @scale.setter
    def scale(self, scale: float) -> None:
        self.strength.set(scale)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B as they are at the moment."""
        return self.lora_A, self.lora_B

    def told(self) -> Told | Opaque:
        """The factors, where they are all that it is."""
        if not self.plain:
            return Opaque("a LoRA that is more than two factors, or not to be fused")
        if self.training and (self.input_dropout or self.dropout.acts):
            return Opaque("a dropout acts")
        return told(self)

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The layer's output (..., out) and the change."""
        x = x.to(self.lora_A.dtype) if self.input_dropout else met(x, self.lora_A)
        if self.magnitude is not None:
            assert isinstance(layer, nn.Linear)
            return (output + self.dora_change(layer, x, output)).to(output.dtype)
        return (output + self.low_rank(Product(layer), self.drop_input(x))).to(output.dtype)

    def drop_input(self, x: Tensor) -> Tensor:
        if self.input_dropout and self.training:
            return functional.dropout(x, self.input_dropout)
        return x

    def low_rank(self, product: Product, x: Tensor) -> Tensor:
        """scale B A x (..., out), with PiSSA scale (B A - B0 A0) x in the form that `without_first` explains."""
        a = self.lora_A if self.first_A is None else self.lora_A - self.first_A
        h = product.down(x, a)  # (..., r)
        if self.training and self.dropout.acts:
            h = product.ranks_back(self.dropout.thin(product.ranks_last(h)))
        if self.scale != 1:
            # On r numbers a token in place of out: exact for powers of two, else equal to rounding.
            h = h * self.scale
        change = product.up(h, self.lora_B)
        if self.first_A is None or self.first_B is None:
            return change
        first = product.down(x, self.first_A)
        return change + product.up(first * self.scale if self.scale != 1 else first, self.lora_B - self.first_B)

    def dora_change(self, linear: nn.Linear, x: Tensor, output: Tensor) -> Tensor:
        """What DoRA adds: (g - 1) W x + g scale B A x, g = m / ||W + scale B A||. arXiv:2402.09353, section 4.3.

        The norm is a constant for the gradient, as the paper advises and PEFT does.
        """
        assert self.magnitude is not None
        with torch.no_grad():
            whole = linear.weight.to(x.dtype) + self.scale * (self.lora_B @ self.lora_A).to(x.dtype)
            norm = torch.linalg.norm(whole, dim=1)
        g = self.magnitude / norm
        if self.input_dropout and self.training:
            x = self.drop_input(x)
            base = functional.linear(x, linear.weight.to(x.dtype))
        else:
            base = output if linear.bias is None else output - linear.bias
        return (g - 1) * base + g * self.low_rank(Product(linear), x)


def refuse_packed(layers: Mapping[str, nn.Module]) -> None:
    """Raises ModelError for a layer whose rows DoRA cannot measure."""
    for path, layer in layers.items():
        if not rows_are_readable(layer):
            raise ModelError(
                f"adapter.dora: the weight of '{path}' is packed ({type(layer).__name__}), and native DoRA needs its "
                "rows. Use backend: peft, or dora: false."
            )
