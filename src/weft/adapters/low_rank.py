"""What a LoRA's tensors are, whoever carries them: names, first values, PiSSA's factors, the max-norm rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.adapters.initial import initial_magnitude, kaiming, principal_factors
from weft.adapters.lora import Lora
from weft.adapters.modules import dense_weight
from weft.math.lowrank import delta_norm, norm_ratio
from weft.math.sharded import held, whole

A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
# PiSSA's first factors. They are part of the saved state, for a decomposition repeated on another device or by another
# version of its library would be another one, and the trained A and B belong to this one.
FIRST_A, FIRST_B = ".lora_A.first", ".lora_B.first"


@dataclass(frozen=True)
class Product:
    """How a layer multiplies x with A, and then with B: a convolution's A has its kernel, its B is 1x1."""

    layer: nn.Module

    @property
    def is_conv(self) -> bool:
        return not isinstance(self.layer, nn.Linear)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (out, in), or (out, in, *kernel)."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return (layer.out_features, layer.in_features)
        assert isinstance(layer, nn.Conv2d | nn.Conv3d)
        return (layer.out_channels, layer.in_channels, *layer.kernel_size)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B."""
        out, *rest = self.shape
        return (rank, *rest), (out, rank, *(1,) * len(rest[1:]))

    def down(self, x: Tensor, a: Tensor, bias: Tensor | None = None) -> Tensor:
        """A x: (..., r), or of a convolution (B, r, ...), and the bias (r,)."""
        layer = self.layer
        if isinstance(layer, nn.Conv3d):
            return functional.conv3d(x, a, bias, layer.stride, layer.padding)
        if isinstance(layer, nn.Conv2d):
            return functional.conv2d(x, a, bias, layer.stride, layer.padding)
        return functional.linear(x, a, bias)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """B h."""
        if isinstance(self.layer, nn.Conv3d):
            return functional.conv3d(h, b)
        if isinstance(self.layer, nn.Conv2d):
            return functional.conv2d(h, b)
        return functional.linear(h, b)

    def ranks_last(self, h: Tensor) -> Tensor:
        """A view of h = A x as (B, ..., r)."""
        return h.movedim(1, -1) if self.is_conv else h

    def ranks_back(self, h: Tensor) -> Tensor:
        """The inverse of `ranks_last`."""
        return h.movedim(-1, 1) if self.is_conv else h


def first_values(
    recipe: Lora, chance: Callable[[str], torch.Generator], shapes: Mapping[str, torch.Size], layer: nn.Module
) -> dict[str, Tensor]:
    """First values by the end of a tensor's name."""
    if recipe.init == "pissa":
        rank, scale = recipe.width(Product(layer).is_conv)
        seed = chance("").initial_seed()
        a, b = principal_factors(dense_weight(layer), rank, scale, recipe.pissa_iterations, seed)
        return {end: (a if end in (A, FIRST_A) else b).view(shape) for end, shape in shapes.items()}
    first = {A: kaiming(shapes[A], chance("")), B: torch.zeros(shapes[B])}
    if MAGNITUDE in shapes:
        first[MAGNITUDE] = initial_magnitude(dense_weight(layer))
    return first


def without_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PiSSA's change B A - B0 A0 as one product of twice the rank, [B, B - B0] [A - A0; A0].

    That is the same number, and nothing large cancels in it: the difference of the two products would lose in bf16 what
    is small beside the principal part of W.
    """
    whole = {}
    for key, tensor in tensors.items():
        if key.endswith(A):
            first = tensors[key.removesuffix(A) + FIRST_A]
            whole[key] = torch.cat([tensor - first, first])
        elif key.endswith(B):
            whole[key] = torch.cat([tensor, tensor - tensors[key.removesuffix(B) + FIRST_B]], 1)
    return whole


def shrink(
    recipe: Lora, paths: Sequence[str], parameters: Mapping[str, nn.Parameter], moved: Tensor | None = None
) -> dict[str, Tensor]:
    """Shrink every ||scale B A||_F above max_norm to it, half in A and half in B. moved: () bool; None: True."""
    assert recipe.max_norm is not None
    norms, ratios = [], []
    for path in paths:
        a, b = parameters[path + A], parameters[path + B]
        _, scale = recipe.width(a.dim() > 2)
        norm = delta_norm(whole(a).flatten(1), whole(b).flatten(1), scale)
        ratio = norm_ratio(norm, recipe.max_norm)
        if moved is not None:  # what was shrunk before may be above the limit by a rounding
            ratio = torch.where(moved, ratio, 1.0)
        held(a).mul_(ratio.sqrt())
        held(b).mul_(ratio.sqrt())
        norms.append(norm * ratio)
        ratios.append(ratio)
    norm_all, scaled = torch.stack(norms), torch.stack(ratios) < 1
    return {
        "max_norm/scaled": scaled.sum().to(norm_all),
        "max_norm/mean": norm_all.mean(),
        "max_norm/largest": norm_all.max(),
    }
