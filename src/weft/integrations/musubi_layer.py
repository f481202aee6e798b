"""One layer of musubi's network under a LoRA: Weft's or PEFT's layer around a twin that shares the base's weights."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from weft.adapters.attach import Standing, attach
from weft.adapters.hooked import CHILD
from weft.adapters.initial import initial_magnitude
from weft.adapters.lora import Lora
from weft.adapters.low_rank import MAGNITUDE, A, B, Product
from weft.adapters.modules import dense_weight, rows_are_readable
from weft.adapters.named import NamedAdapters
from weft.adapters.native import LowRank
from weft.errors import ConfigError, ModelError
from weft.integrations.musubi_targets import Target

NAME = "default"  # of the adapter inside the carriers; it is in no file


@dataclass(frozen=True)
class Width:
    """Rank and alpha of one layer's LoRA, whose scale is alpha / rank."""

    rank: int
    alpha: float

    @classmethod
    def of(cls, rank: int, alpha: float | None, rslora: bool = False) -> "Width":
        """As musubi reads its arguments: alpha None or 0 is the rank. rslora: alpha becomes that of alpha / sqrt(rank),
        so that the scale is alpha / rank for every reader of the file."""
        alpha = float(alpha or rank)
        return cls(rank, alpha * sqrt(rank) if rslora else alpha)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What all layers of a network have in common."""

    backend: Literal["peft", "native"] = "peft"
    dora: bool = False
    dropout: float = 0.0  # of the rank activations
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    def recipe(self, width: Width) -> Lora:
        """The LoRA of layers of one width, convolutions among them. Raises ConfigError."""
        dropouts = (self.dropout, self.rank_dropout, self.module_dropout)
        if self.dora and any(dropouts):
            raise ConfigError(
                "network_args, dora=True: DoRA measures W + scale B A, which network_dropout, rank_dropout and "
                "module_dropout would alter. Leave them out, or dora."
            )
        conv = None if self.dora else width.rank
        return Lora(
            backend=self.backend,
            rank=width.rank,
            alpha=width.alpha,
            conv_rank=conv,
            conv_alpha=width.alpha if conv else None,
            dora=self.dora,
            activation_dropout=self.dropout,
            rank_dropout=self.rank_dropout,
            module_dropout=self.module_dropout,
        )


class Factor(nn.Module):
    """A or B under the name that musubi's files have for it; the parameter is the carrier's own."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class AdaptedLayer(nn.Module):
    """A layer and its LoRA, as the network object holds it: parameters lora_down, lora_up, and alpha beside them.

    The base stays where and what it was, with its own name, class and weights; only its `forward` is this one's. The
    layer of PEFT or of ours that computes stands around a twin of the base, and is no child of any module.
    """

    alpha: Tensor  # fp32, whose quotient by the rank is the scale: also after it was loaded

    def __init__(self, target: Target, width: Width, carried: nn.Module, tensors: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.lora_name = target.name
        self.path = target.path
        self.base = (target.layer,)  # a tuple, so that it is no child
        self.carried = (carried,)
        self.lora_down = Factor(tensors[A])
        self.lora_up = Factor(tensors[B])
        self.dora_scale = tensors.get(MAGNITUDE)  # (out,)
        self.register_buffer("alpha", torch.tensor(width.alpha, dtype=torch.float32))
        self.multiplier = 1.0
        self.enabled = True
        self.base_forward: Callable[[Tensor], Tensor] = target.layer.forward
        self.rescale()

    @property
    def lora_dim(self) -> int:
        """The rank."""
        return len(self.lora_down.weight)

    @property
    def scale(self) -> float:
        """The factor before B A, without the multiplier."""
        return float(self.alpha) / self.lora_dim

    def rescale(self) -> None:
        """Let the layer count by its alpha and its multiplier, after either has changed."""
        (carried,), scale = self.carried, self.multiplier * self.scale
        if isinstance(carried, LoraLayer):
            carried.scaling[NAME] = scale
        else:
            change = carried.get_submodule(f"{CHILD}.{NAME}")
            assert isinstance(change, LowRank)
            change.scale = scale

    def apply_to(self) -> None:
        """Answer in the base's place from now on, also where another patch answers already, such as fp8's."""
        (base,), (carried,) = self.base, self.carried
        self.base_forward = base.forward
        twin = carried.get_base_layer() if isinstance(carried, LoraLayer) else carried
        twin.forward = base.forward
        base.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        """The layer's answer (..., out) in the dtype of the base's own."""
        if not self.enabled:
            return self.base_forward(x)
        (carried,) = self.carried
        if isinstance(carried, LoraLayer):
            # Without autocast PEFT widens x for the fp32 factors. Autocast narrows what it multiplies by itself, and
            # a wide copy of x would be kept for the backward pass.
            widens = not torch.is_autocast_enabled(x.device.type)
            if carried.cast_input_dtype_enabled != widens:
                carried.cast_input_dtype_enabled = widens
        return carried(x)

    def train(self, mode: bool = True) -> "AdaptedLayer":
        """Dropouts act in the layer that computes."""
        super().train(mode)
        self.carried[0].train(mode)
        return self

    def delta(self, down: Tensor, up: Tensor, scale: float) -> Tensor:
        """multiplier scale B A in fp32, in the shape of the base's weight."""
        (base,) = self.base
        made = self.multiplier * (up.flatten(1).float() @ down.flatten(1).float()) * scale
        return made.view(Product(base).shape)


def adapted_layers(targets: Sequence[tuple[Target, Width]], method: Method) -> list[AdaptedLayer]:
    """Fresh adapters for layers, in their order; nothing is applied yet. Raises ModelError for a layer that cannot be
    adapted."""
    first = {target.name: _first_down(target, width.rank) for target, width in targets}
    carriers = {}
    for width in dict.fromkeys(width for _, width in targets):
        here = [target for target, own in targets if own == width]
        carriers[width] = _carrier(here, width, method, first)
    return [_adapted(target, width, *carriers[width]) for target, width in targets]


def _carrier(
    targets: Sequence[Target], width: Width, method: Method, first: dict[str, Tensor]
) -> tuple[nn.Module, NamedAdapters]:
    """Adapters on twins of some layers, of one width: the module that has them as children, and their weights."""
    if method.dora:
        _refuse_coded(targets)
    beside = nn.Module()
    for target in targets:
        beside.add_module(target.name, twin_of(target.layer))
    standing = Standing(method.recipe(width), [target.name for target in targets])
    adapters = attach(beside, {NAME: standing}, seed=0)
    tensors = {}
    for target in targets:
        tensors[target.name + A] = first[target.name]
        tensors[target.name + B] = torch.zeros(Product(target.layer).shapes(width.rank)[1])
        if method.dora:
            tensors[target.name + MAGNITUDE] = initial_magnitude(dense_weight(target.layer))
    adapters.load_state_dict(NAME, tensors)
    for carrier in adapters.carriers:
        carrier.answer(NAME)
    return beside, adapters


def _adapted(target: Target, width: Width, beside: nn.Module, adapters: NamedAdapters) -> AdaptedLayer:
    own = adapters.parameters(NAME)
    tensors = {end: own[target.name + end] for end in (A, B, MAGNITUDE) if target.name + end in own}
    return AdaptedLayer(target, width, beside.get_submodule(target.name), tensors)


def twin_of(layer: nn.Module) -> nn.Module:
    """A layer of the same class whose parameters and buffers are the base's own, whatever they are replaced by later:
    block swap and the exchange of experts put other tensors in their places. It has no hooks and no children."""
    twin = copy(layer)
    for name in vars(layer):
        if "_hooks" in name:
            vars(twin)[name] = OrderedDict()
    twin._modules = {}
    return twin


def _first_down(target: Target, rank: int) -> Tensor:
    """A's first values, drawn as musubi draws them: from torch's own generator, with what its unused draws take from
    it, so that a run with the same seed sees the same weights, noise and times as with musubi's own network."""
    a, b = Product(target.layer).shapes(rank)
    down, up = torch.empty(a, device="cpu"), torch.empty(b, device="cpu")
    for tensor in (down, up, down):  # a layer's own first values, twice, then musubi's
        nn.init.kaiming_uniform_(tensor, a=sqrt(5))
    return down


def _refuse_coded(targets: Sequence[Target]) -> None:
    for target in targets:
        if isinstance(target.layer, nn.Linear) and rows_are_readable(target.layer):
            continue
        raise ModelError(
            f"network_args, dora=True: '{target.path}' is a convolution, or its weight is in fp8 or packed, and DoRA "
            "needs its rows. Train without fp8_base, or without dora."
        )
