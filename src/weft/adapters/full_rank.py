"""A whole matrix beside the weight of a layer: what the layer's hook adds to its answer."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from weft.adapters.fused import met
from weft.adapters.hooked import Change
from weft.adapters.low_rank import Product
from weft.adapters.named import UNSET

WEIGHT, BIAS = ".full.weight", ".full.bias"


class FullRank(Change):
    """D beside the weight W of one layer, of its shape, and a change (out,) of its bias where there is one."""

    ends: ClassVar[Mapping[str, str]] = {"weight": WEIGHT, "bias": BIAS}

    def __init__(self, layer: nn.Module, bias: bool) -> None:
        super().__init__()
        device = next(layer.parameters()).device
        d = torch.full(Product(layer).shape, UNSET, device=device, dtype=torch.float32)
        self.weight = nn.Parameter(d)
        has_bias = bias and layer.bias is not None
        self.bias = nn.Parameter(torch.full((len(d),), UNSET, device=device)) if has_bias else None

    def forward(self, layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """(W + D) x and both biases: the base's own answer and, beside it, D's, so that the base may be packed."""
        return (output + Product(layer).down(met(x, self.weight), self.weight, self.bias)).to(output.dtype)
