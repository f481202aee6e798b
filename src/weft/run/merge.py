"""The average of several adapters: of the changes that they make, and never of their factors.

The mean of B1 A1 and B2 A2 is not (B1 + B2) (A1 + A2) / 4: cross terms come in, and the factors of one change may be
turned against those of the other. Factors side by side, [w1 B1, w2 B2] [A1; A2], are the mean exactly, at the sum of
the ranks.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from weft import plugins
from weft.durable import write_folder
from weft.errors import ConfigError, ModelError
from weft.families.causal_lm import CausalLM
from weft.formats.adapter_file import A, B, SavedAdapter
from weft.formats.diffusers import DiffusersFile
from weft.formats.peft import PeftFolder
from weft.formats.reading import read_adapter
from weft.run.assemble import find_adapter


@dataclass(frozen=True)
class Parent:
    """An adapter that goes into an average, and its share, of all shares that sum to 1."""

    path: Path
    adapter: SavedAdapter
    share: float


@dataclass(frozen=True)
class Average:
    """An averaged adapter. lost: of each layer ||change - exact||_F / ||exact||_F; empty when nothing was cut off.

    whole: the same over all layers together.
    """

    adapter: SavedAdapter
    lost: Mapping[str, float]
    whole: float


def read_parents(paths: Sequence[Path], weights: Sequence[float] | None) -> list[Parent]:
    """The adapters at paths (or of the runs there). Raises WeftError for those that have no common average."""
    if len(paths) < 2:
        raise ConfigError("--average: an average needs two adapters at least. Name more.")
    weights = [1.0] * len(paths) if weights is None else weights
    if len(weights) != len(paths) or min(weights) <= 0:
        raise ConfigError(
            f"--weights: expected {len(paths)} numbers above 0, one for each adapter, got {len(weights)}."
        )
    found = [find_adapter(path) for path in paths]
    parents = [Parent(p, read_adapter(p), w / sum(weights)) for p, w in zip(found, weights, strict=True)]
    for parent in parents:
        _refuse_other_kinds(parent)
        _refuse_strangers(parents[0], parent)
    return parents


def average(parents: Sequence[Parent], rank: int | None = None) -> Average:
    """The mean of the changes, exact, or of a given rank the nearest to it (Eckart and Young 1936)."""
    first = parents[0].adapter
    tensors: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    cut, norm = 0.0, 0.0  # squared
    ranks: dict[bool, int] = {}  # of linear layers, and of convolutions
    for path in first.paths:
        a, b = side_by_side(parents, path)
        is_conv = first.tensors[path + A].dim() > 2
        if rank is not None and rank < len(a):
            a, b, values = truncated(a, b, rank)
            cut_here, norm_here = float(values[rank:].square().sum()), float(values.square().sum())
            lost[path] = (cut_here / norm_here) ** 0.5 if norm_here else 0.0
            cut, norm = cut + cut_here, norm + norm_here
        ranks[is_conv] = len(a)
        ones = (1,) * (first.tensors[path + A].dim() - 2)
        tensors[path + A] = a.float().view(len(a), *first.tensors[path + A].shape[1:]).contiguous()
        tensors[path + B] = b.float().view(*b.shape, *ones).contiguous()
    conv_rank = ranks.get(True)
    made = replace(
        first, tensors=tensors, rank=ranks.get(False, conv_rank or 0), alpha=float(ranks.get(False, conv_rank or 0)),
        rslora=False, targets=first.paths, metadata=provenance(parents, rank), conv_rank=conv_rank,
        conv_alpha=float(conv_rank) if conv_rank else None,
    )  # fmt: skip
    return Average(made, lost, (cut / norm) ** 0.5 if norm else 0.0)


def side_by_side(parents: Sequence[Parent], path: str) -> tuple[Tensor, Tensor]:
    """A (sum of ranks, in) and B (out, sum of ranks) in fp64, whose product is the mean change of a layer."""
    above = [parent.adapter.tensors[path + A].double().flatten(1) for parent in parents]
    beside = [
        parent.share * parent.adapter.scale_at(path) * parent.adapter.tensors[path + B].double().flatten(1)
        for parent in parents
    ]
    return torch.cat(above), torch.cat(beside, 1)


def truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of the product nearest to B A, and all singular values of that, largest first.

    From the small core of two QR decompositions; the root of each value goes to either side.
    """
    left, core_b = torch.linalg.qr(b)
    right, core_a = torch.linalg.qr(a.mT)
    u, values, vh = torch.linalg.svd(core_b @ core_a.mT, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * (vh[:rank] @ right.mT), left @ u[:, :rank] * root, values


def provenance(parents: Sequence[Parent], rank: int | None) -> dict[str, str]:
    """What all parents say alike, the first one's config (for the family and the samples), and who the parents are."""
    headers = [parent.adapter.metadata for parent in parents]
    common = {key: value for key, value in headers[0].items() if all(h.get(key) == value for h in headers)}
    if "weft.config" in headers[0]:
        common["weft.config"] = headers[0]["weft.config"]
    who = [
        {
            "adapter": str(parent.path),
            "share": parent.share,
            "rank": parent.adapter.rank,
            "scale": parent.adapter.scale,
            "run": json.loads(header.get("weft.config", "{}")).get("name"),
            **{key.removeprefix("weft."): header[key] for key in ("weft.step", "weft.data") if key in header},
        }
        for parent, header in zip(parents, headers, strict=True)
    ]
    return {**common, "weft.merged": json.dumps({"method": "average of changes", "rank": rank, "parents": who})}


def write_average(folder: Path, adapter: SavedAdapter) -> None:
    """Write the adapter for PEFT, and one of a video model for diffusers. Raises ConfigError for a folder that holds
    something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out: {folder} is there already and not empty. Name a new folder.")
    write_folder(folder, partial(_fill, adapter))


def _fill(adapter: SavedAdapter, folder: Path) -> None:
    PeftFolder().write(folder, adapter)
    if medium_of(adapter) == "video":
        DiffusersFile().write(folder, adapter)


def medium_of(adapter: SavedAdapter) -> str:
    """video or text: as its header says, else as the layers are called that it stands on."""
    named = plugins.section_types("family").get(adapter.metadata.get("weft.family", ""))
    if named is not None:
        return named.medium
    patterns = [CausalLM.targets[name] for name in ("attention", "mlp")]
    decoder = any(re.fullmatch(pattern, path) for pattern in patterns for path in adapter.paths)
    return "text" if decoder else "video"


def _refuse_other_kinds(parent: Parent) -> None:
    adapter = parent.adapter
    name = adapter.kind if adapter.kind != "lora" else "DoRA"
    if adapter.kind != "lora" or adapter.dora:
        raise ModelError(
            f"{parent.path} is of kind {name}, and the mean of several such changes is none of that kind. "
            "Only LoRA adapters can be averaged."
        )


def _refuse_strangers(first: Parent, other: Parent) -> None:
    ours, theirs = first.adapter, other.adapter
    if odd := sorted(set(ours.paths) ^ set(theirs.paths)):
        where = other.path if odd[0] in theirs.paths else first.path
        raise ModelError(
            f"{first.path} and {other.path} stand on other layers: {len(odd)} are in one alone, such as '{odd[0]}' in "
            f"{where}. Average adapters that were trained with the same adapter.targets."
        )
    for path in ours.paths:
        sizes = [(tuple(a.tensors[path + B].shape[:1]), tuple(a.tensors[path + A].shape[1:])) for a in (ours, theirs)]
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"{first.path} and {other.path} are for models of other sizes: '{path}' is {sizes[0][1]} -> "
                f"{sizes[0][0]} in one and {sizes[1][1]} -> {sizes[1][0]} in the other."
            )
    for key, what in (("weft.base", "on other base weights"), ("weft.expert", "for another expert")):
        values = [parent.adapter.metadata.get(key) for parent in (first, other)]
        if None not in values and values[0] != values[1]:
            raise ModelError(
                f"{other.path} was trained {what} than {first.path} ({key} in their files: {values[1]} and "
                f"{values[0]}), so their changes do not add up."
            )
