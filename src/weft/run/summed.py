"""One LoRA that changes what several change together: each layer by the sum of what they change there.

The factors stand side by side, [w1 B1, w2 B2] [A1; A2], at the sum of the ranks: the sum exactly. The sum of the
factors, (B1 + B2) (A1 + A2), is another change: cross terms come in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from weft.errors import ModelError
from weft.few_steps import StepList
from weft.formats.adapter_file import A, B, SavedAdapter


@dataclass(frozen=True)
class Part:
    """An adapter that goes into a sum, and how much its change counts there; 1: as it was trained."""

    path: Path
    adapter: SavedAdapter
    weight: float


@dataclass(frozen=True)
class Sum:
    """A summed adapter. lost: of each layer ||change - exact||_F / ||exact||_F; empty when nothing was cut off.

    whole: the same over all layers together.
    """

    adapter: SavedAdapter
    lost: Mapping[str, float]
    whole: float


def summed(parts: Sequence[Part], metadata: Mapping[str, str], rank: int | None = None) -> Sum:
    """The sum of the changes, exact, or of a given rank the nearest to it (Eckart and Young 1936). Layers may be in
    some of the parts alone."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    lost: dict[str, float] = {}
    cut, norm = 0.0, 0.0  # squared
    shapes = {path: one.adapter.tensors[path + A].shape for one in parts for path in one.adapter.paths}
    paths = tuple(dict.fromkeys(path for one in parts for path in one.adapter.paths))
    for path in paths:
        a, b = side_by_side(parts, path)
        if rank is not None and rank < len(a):
            a, b, values = truncated(a, b, rank)
            cut_here, norm_here = float(values[rank:].square().sum()), float(values.square().sum())
            lost[path] = (cut_here / norm_here) ** 0.5 if norm_here else 0.0
            cut, norm = cut + cut_here, norm + norm_here
        factors[path] = (a.float(), b.float())
    conv = {path: len(shapes[path]) > 2 for path in paths}
    ranks = {kind: max(len(factors[path][0]) for path in paths if conv[path] == kind) for kind in set(conv.values())}
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in factors.items():
        missing = ranks[conv[path]] - len(a)  # where some of the parts do not stand
        ones = (1,) * (len(shapes[path]) - 2)
        tensors[path + A] = functional.pad(a, (0, 0, 0, missing)).view(-1, *shapes[path][1:]).contiguous()
        tensors[path + B] = functional.pad(b, (0, missing)).view(len(b), -1, *ones).contiguous()
    conv_rank = ranks.get(True)
    linear_rank = ranks.get(False, conv_rank or 0)
    made = replace(
        parts[0].adapter, tensors=tensors, rank=linear_rank, alpha=float(linear_rank), rslora=False, targets=paths,
        metadata=dict(metadata), conv_rank=conv_rank, conv_alpha=float(conv_rank) if conv_rank else None,
    )  # fmt: skip
    return Sum(made, lost, (cut / norm) ** 0.5 if norm else 0.0)


def side_by_side(parts: Sequence[Part], path: str) -> tuple[Tensor, Tensor]:
    """A (sum of ranks, in) and B (out, sum of ranks) in fp64, whose product is the summed change of a layer."""
    here = [one for one in parts if path + A in one.adapter.tensors]
    above = [one.adapter.tensors[path + A].double().flatten(1) for one in here]
    beside = [
        one.weight * one.adapter.scale_at(path) * one.adapter.tensors[path + B].double().flatten(1) for one in here
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


def refuse_other_sizes(first: Part, other: Part) -> None:
    """Raises ModelError for adapters of models of other sizes."""
    ours, theirs = first.adapter, other.adapter
    for path in sorted(set(ours.paths) & set(theirs.paths)):
        sizes = [(tuple(a.tensors[path + B].shape[:1]), tuple(a.tensors[path + A].shape[1:])) for a in (ours, theirs)]
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"{first.path} and {other.path} are for models of other sizes: '{path}' is {sizes[0][1]} -> "
                f"{sizes[0][0]} in one and {sizes[1][1]} -> {sizes[1][0]} in the other."
            )


def refuse_without_sum(parts: Sequence[Part]) -> None:
    """Raises ModelError for adapters whose changes have no sum that one LoRA could hold."""
    for one in parts:
        if one.adapter.kind != "lora" or one.adapter.dora:
            raise ModelError(
                f"{one.path} is of kind {kind_of(one.adapter)}, whose change and another one are no LoRA together. "
                "Only LoRA adapters can be added up: use this one alone."
            )
        refuse_other_sizes(parts[0], one)


def kind_of(adapter: SavedAdapter) -> str:
    return "DoRA" if adapter.dora else adapter.kind


def common_step_list(parts: Sequence[tuple[Path, SavedAdapter]]) -> StepList | None:
    """The times of those that are few-step students; None when none is. Raises ModelError when they differ."""
    found: list[tuple[Path, StepList]] = []
    for path, adapter in parts:
        try:
            steps = adapter.step_list
        except ValueError as error:
            raise ModelError(f"{path}: its header is damaged: {error}.") from error
        if steps is not None:
            found.append((path, steps))
    for path, steps in found:
        if steps != found[0][1]:
            raise ModelError(
                f"{found[0][0]} and {path} were distilled for other steps: {found[0][1]}, and {steps}. "
                "Give students of one run."
            )
    return found[0][1] if found else None
