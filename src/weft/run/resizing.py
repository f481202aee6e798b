"""A LoRA of a smaller rank: each layer's change cut to its largest singular values."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from torch.nn import functional

from weft.errors import ConfigError, ModelError
from weft.formats.adapter_file import A, B, SavedAdapter
from weft.run.summed import Part, kind_of, side_by_side, truncated


@dataclass(frozen=True)
class Cut:
    """How ranks are chosen: one for all, or of each layer the smallest that keeps a share of ||change||_F^2, but none
    above `largest`."""

    rank: int | None = None
    energy: float | None = None
    largest: int | None = None

    def of(self, values: Tensor) -> int:
        """The rank for a layer with such singular values, largest first."""
        if self.rank is not None:
            return min(self.rank, len(values))
        assert self.energy is not None
        kept = values.square().cumsum(0)
        enough = int((kept < self.energy * kept[-1]).sum()) + 1 if float(kept[-1]) else 1
        return min(enough, len(values), self.largest or len(values))


@dataclass(frozen=True)
class Resized:
    """ranks and lost: of each layer, lost being ||change - kept||_F / ||change||_F; whole: over all layers."""

    adapter: SavedAdapter
    ranks: Mapping[str, int]
    lost: Mapping[str, float]
    whole: float


def resized(path: Path, adapter: SavedAdapter, cut: Cut) -> Resized:
    """The nearest adapter of smaller ranks (Eckart and Young 1936); its scale is 1, and shorter layers are filled up
    with zeros. Raises ModelError for other kinds than LoRA, ConfigError for a rank that is no smaller."""
    _refuse(path, adapter, cut)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    lost: dict[str, float] = {}
    gone = norm = 0.0  # squared
    for layer in adapter.paths:
        a, b, values = truncated(*side_by_side([Part(path, adapter, 1.0)], layer), len(adapter.tensors[layer + A]))
        rank = cut.of(values)
        here, whole = float(values[rank:].square().sum()), float(values.square().sum())
        lost[layer] = (here / whole) ** 0.5 if whole else 0.0
        gone, norm = gone + here, norm + whole
        factors[layer] = (a[:rank].float(), b[:, :rank].float())
    ranks = {layer: len(a) for layer, (a, _) in factors.items()}
    share = (gone / norm) ** 0.5 if norm else 0.0
    return Resized(_filled(adapter, factors, cut, share), ranks, lost, share)


def _filled(adapter: SavedAdapter, factors: Mapping[str, tuple[Tensor, Tensor]], cut: Cut, lost: float) -> SavedAdapter:
    """The factors at one rank, of linear layers and of convolutions."""
    conv = {layer: adapter.tensors[layer + A].dim() > 2 for layer in factors}
    largest = {
        kind: max(len(factors[layer][0]) for layer in factors if conv[layer] == kind) for kind in {*conv.values()}
    }
    tensors: dict[str, Tensor] = {}
    for layer, (a, b) in factors.items():
        shape, missing = adapter.tensors[layer + A].shape, largest[conv[layer]] - len(a)
        ones = (1,) * (len(shape) - 2)
        tensors[layer + A] = functional.pad(a, (0, 0, 0, missing)).view(-1, *shape[1:]).contiguous()
        tensors[layer + B] = functional.pad(b, (0, missing)).view(len(b), -1, *ones).contiguous()
    conv_rank = largest.get(True)
    rank = largest.get(False, conv_rank or 0)
    before = {"rank": adapter.rank, "alpha": adapter.alpha, "rslora": adapter.rslora}
    asked = {name: value for name, value in vars(cut).items() if value is not None}
    told = {"from": before, "asked": asked, "lost": lost, "before": adapter.metadata.get("weft.resized")}
    return replace(
        adapter, tensors=tensors, rank=rank, alpha=float(rank), rslora=False, conv_rank=conv_rank,
        conv_alpha=float(conv_rank) if conv_rank else None,
        metadata={**adapter.metadata, "weft.resized": json.dumps(told)},
    )  # fmt: skip


def _refuse(path: Path, adapter: SavedAdapter, cut: Cut) -> None:
    if adapter.kind != "lora" or adapter.dora:
        why = "what a smaller rank loses of it depends on the weights of the base" if adapter.dora else "it is no LoRA"
        raise ModelError(
            f"{path} is of kind {kind_of(adapter)}: {why}. Merge it into the base, and find the LoRA nearest to what "
            "came out: weft merge ADAPTER --into BASE, then weft extract."
        )
    there = max(adapter.rank, adapter.conv_rank or 0)
    if cut.rank is not None and cut.rank >= there:
        raise ConfigError(f"--rank: {path} has rank {there} already; expected a whole number from 1 to {there - 1}.")
