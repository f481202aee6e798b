"""What another program makes of an adapter file: which layers it changes and how, and which keys it passes over."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from weft.names.modules import Rows


@dataclass(frozen=True)
class Delta:
    """What a program does to one module's weight W (out, in, *kernel), in fp64; the fields mean what those of
    `weft.run.changes.Change` mean."""

    factors: tuple[Tensor, Tensor] | None = None
    whole: Tensor | None = None
    rotation: Tensor | None = None
    magnitude: Tensor | None = None
    kernel: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs, and inputs of all places of the kernel. A rotation has no outputs of its own."""
        if self.factors is not None:
            return len(self.factors[0]), self.factors[1].shape[1]
        assert self.whole is not None
        return len(self.whole), self.whole.shape[1]

    def rows(self, ranges: Rows) -> "Delta":
        """That of a module which has these rows of the outputs; all of them where there are no ranges."""
        if not ranges:
            return self

        def cut(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[start:end] for start, end in ranges])

        return replace(
            self,
            factors=self.factors and (cut(self.factors[0]), self.factors[1]),
            whole=None if self.whole is None else cut(self.whole),
            magnitude=None if self.magnitude is None else cut(self.magnitude),
        )


@dataclass(frozen=True)
class Stored:
    """An adapter file as it lies there. config: the adapter_config.json beside it, where there is one."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Use:
    """What a program makes of a file.

    layers: a module's name -> what is done to it, computed when asked for. canonical: the names are ours, not the
    makers'. ignored: keys that it passes over. faults: sentences on why it stops, or computes something else.
    lengths_of_base: of DoRA it takes the lengths as factors of |W + dW| / |W| of each row, not of 1.
    """

    layers: Mapping[str, Callable[[], Delta]]
    canonical: bool = False
    ignored: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()
    lengths_of_base: bool = False


def product(up: Tensor, down: Tensor, scale: float, magnitude: Tensor | None = None) -> Delta:
    """scale up down, of up (out, r, ...) and down (r, in, *kernel)."""
    return Delta(
        factors=(scale * up.double().flatten(1), down.double().flatten(1)),
        magnitude=None if magnitude is None else magnitude.double().flatten(),
        kernel=tuple(down.shape[2:]),
    )


def hadamard(parts: Mapping[str, Tensor], scale: float) -> Delta:
    """scale (w1_a w1_b) * (w2_a w2_b): LoHa, arXiv:2108.06098."""
    halves = [parts[f"hada_w{n}_a"].double() @ parts[f"hada_w{n}_b"].double() for n in (1, 2)]
    return Delta(whole=scale * halves[0] * halves[1])


def kronecker(parts: Mapping[str, Tensor], scale: float) -> Delta:
    """scale w1 x w2, each of which may be a product: LoKr, arXiv:2309.14859."""

    def half(name: str) -> Tensor:
        if name in parts:
            return parts[name].double()
        return parts[f"{name}_a"].double() @ parts[f"{name}_b"].double()

    return Delta(whole=scale * torch.kron(half("lokr_w1"), half("lokr_w2")))
