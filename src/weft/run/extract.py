"""The LoRA nearest to the difference of two models, found layer by layer, and what it cannot hold of that."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from weft.errors import ModelError
from weft.families.memory import returned_at_once
from weft.formats.adapter_file import A, B, SavedAdapter
from weft.math.chance import generator
from weft.math.low_rank_of import LowRank, energy_of, nearest, nearest_holding, rounding_energy, share_of_noise
from weft.run.base_weights import EMBEDDINGS, BaseWeights

HALF = (torch.bfloat16, torch.float16)
LIKE_ROUNDING = 4.0  # energies of a difference that may be rounding's, in those expected of rounding
LIKE_NOISE = 1.25  # shares held of a difference without directions, in the largest that is expected of noise
TELLING = 0.5  # share above which even noise is held, so that the spectrum does not tell


@dataclass(frozen=True)
class Rule:
    """The rank of a layer: a fixed one, or the smallest that captures a share of ||D||_F^2, and `most` at most."""

    most: int
    share: float | None = None

    def nearest(self, difference: Tensor, chance: torch.Generator) -> LowRank:
        if self.share is None:
            return nearest(difference, self.most, chance)
        return nearest_holding(difference, self.share, self.most, chance)


@dataclass(frozen=True)
class Layer:
    """What is held of one layer's difference. energy, missed: ||D||_F^2, and that of D less what is held. rounding: the
    energy that rounding to 16 bits explains. rounded: whether the difference looks like nothing else."""

    rank: int
    energy: float
    missed: float
    rounding: float = 0.0
    rounded: bool = False

    @property
    def captured(self) -> float:
        return 1 - self.missed / self.energy


@dataclass
class LeftOut:
    """Tensors of one kind that differ and are not held: their names, the energy of what they differ by, and of what
    they were."""

    names: list[str] = field(default_factory=list)
    energy: float = 0.0
    before: float = 0.0

    def add(self, name: str, energy: float, before: float) -> None:
        self.names.append(name)
        self.energy, self.before = self.energy + energy, self.before + before


@dataclass(frozen=True)
class Extraction:
    """The adapter, what it holds by layer, and what it leaves out by kind. unchanged: paths of target layers that are
    the same but for rounding. alone: names of tensors that one of the models has not."""

    adapter: SavedAdapter
    layers: Mapping[str, Layer]
    left_out: Mapping[str, LeftOut]
    unchanged: tuple[str, ...]
    alone: tuple[str, ...]

    @property
    def energy(self) -> float:
        """||D||_F^2 over the layers that are held."""
        return sum(layer.energy for layer in self.layers.values())

    @property
    def captured(self) -> float:
        """The share of that which the adapter has."""
        return 1 - sum(layer.missed for layer in self.layers.values()) / self.energy

    @property
    def captured_of_all(self) -> float:
        """The share that the adapter has of everything that differs."""
        whole = self.energy + sum(kind.energy for kind in self.left_out.values())
        return self.captured * self.energy / whole


def extract(
    base: BaseWeights,
    tuned: BaseWeights,
    targets: Sequence[str],
    rule: Rule,
    device: torch.device,
    seen: Callable[[str], None] = lambda name: None,
) -> Extraction:
    """The adapter whose change is nearest to tuned - base on the target layers. Two tensors are in memory at a time.
    seen: told of each tensor before it is read.

    Raises: ModelError for models of other sizes, for equal ones, and for weights that are no numbers.
    """
    common = [name for name in base.shapes if name in tuned.shapes]
    refuse_other_sizes(base, tuned, common, targets)
    held: dict[str, tuple[Layer, tuple[Tensor, Tensor]]] = {}
    unchanged: list[str] = []
    left_out: dict[str, LeftOut] = {}
    with returned_at_once():
        for name in common:
            seen(name)
            path = name.removesuffix(".weight")
            difference, before, rounding = _compared(base, tuned, name)
            if difference is not None and path in targets:
                held[path] = _layer(difference.to(device), rule, rounding, generator("cpu", "extract", name))
            elif difference is not None:
                kind = left_out.setdefault(_kind(name, path in base.linear), LeftOut())
                kind.add(name, energy_of(difference), before)
            elif path in targets:
                unchanged.append(path)
            del difference  # or it would stay beside the next two
    refuse_no_difference(base, tuned, held, left_out)
    order = [path for path in targets if path in held]
    return Extraction(
        adapter=adapter_of({path: held[path][1] for path in order}),
        layers={path: held[path][0] for path in order},
        left_out=left_out,
        unchanged=tuple(unchanged),
        alone=tuple(sorted(base.shapes.keys() ^ tuned.shapes.keys())),
    )


def adapter_of(factors: Mapping[str, tuple[Tensor, Tensor]]) -> SavedAdapter:
    """Factors B (out, r) and A (r, in) of layers as one adapter at scale 1; ranks are filled up with zeros."""
    rank = max(len(a) for _, a in factors.values())
    tensors: dict[str, Tensor] = {}
    for path, (b, a) in factors.items():
        missing = rank - len(a)
        tensors[path + A] = functional.pad(a, (0, 0, 0, missing)).contiguous()
        tensors[path + B] = functional.pad(b, (0, missing)).contiguous()
    return SavedAdapter(tensors, rank, float(rank), targets=tuple(factors))


def refuse_other_sizes(base: BaseWeights, tuned: BaseWeights, common: Iterable[str], targets: Sequence[str]) -> None:
    """Raises ModelError for two models that have no difference."""
    if base.family != tuned.family:
        raise ModelError(
            f"{base.path} is a {base.family} network and {tuned.path} a {tuned.family} one. Name two of one family."
        )
    for name in common:
        if base.shapes[name] != tuned.shapes[name]:
            raise ModelError(
                f"{base.path} and {tuned.path} are models of other sizes: '{name}' is {base.shapes[name]} in the first "
                f"and {tuned.shapes[name]} in the second. Name the base that the tuned model was made from."
            )
    missing = [path for path in targets if f"{path}.weight" not in tuned.shapes]
    if missing:
        raise ModelError(
            f"{tuned.path} lacks {len(missing)} of the {len(targets)} target layers, first '{missing[0]}'. It is of "
            "another size, or incomplete."
        )


def refuse_no_difference(
    base: BaseWeights, tuned: BaseWeights, held: Collection[str], left_out: Mapping[str, LeftOut]
) -> None:
    """Raises ModelError where no target layer differs."""
    if held:
        return
    if not left_out:
        raise ModelError(
            f"{base.path} and {tuned.path} hold the same weights, but for rounding: there is nothing to extract."
        )
    where = ", ".join(f"{kind} ({len(of.names)})" for kind, of in left_out.items())
    raise ModelError(
        f"no target layer differs between {base.path} and {tuned.path}; what differs is: {where}, such as "
        f"'{next(iter(left_out.values())).names[0]}'. Name other --targets."
    )


def _compared(base: BaseWeights, tuned: BaseWeights, name: str) -> tuple[Tensor | None, float, float]:
    """tuned - base in fp32, None where they are equal or one is the other in a smaller dtype; the energy of the base's
    tensor; and that which rounding to 16 bits explains. Raises ModelError for what is not finite."""
    one, other = base.read(name), tuned.read(name)
    kinds = base.dtype(name), tuned.dtype(name)
    coarse = max(kinds, key=lambda kind: torch.finfo(kind).eps if kind.is_floating_point else 0.0)
    rounds = coarse in HALF
    if torch.equal(one, other) or (rounds and torch.equal(one.to(coarse), other.to(coarse)) and kinds[0] != kinds[1]):
        return None, 0.0, 0.0
    rounded = other if kinds[1] == coarse else one
    before, rounding = energy_of(one), rounding_energy(rounded, coarse) if rounds else 0.0
    difference = other.sub_(one)
    if not difference.isfinite().all():
        raise ModelError(
            f"'{name}' holds inf or nan in {base.path} or {tuned.path}, so that the two have no difference. Fetch that "
            "file again, or save the tuned model in bf16."
        )
    return difference, before, rounding


def _layer(
    difference: Tensor, rule: Rule, rounding: float, chance: torch.Generator
) -> tuple[Layer, tuple[Tensor, Tensor]]:
    """What is held of a difference, and its factors on the host."""
    low = rule.nearest(difference, chance)
    rank, energy = len(low.values), low.energy
    # Rounding has no directions: a rank holds of it what it holds of noise, and no more.
    noise = share_of_noise(difference.shape[0], difference.shape[1], rank)
    rounded = energy <= LIKE_ROUNDING * rounding and noise < TELLING and low.captured < LIKE_NOISE * noise
    b, a = low.factors()
    return Layer(rank, energy, low.missed, rounding, rounded), (b.cpu(), a.cpu())


def _kind(name: str, linear: bool) -> str:
    """What a tensor that is no target is, in a word for a report."""
    if linear:
        return "linear layers outside --targets"
    if name.endswith(".bias"):
        return "biases"
    if EMBEDDINGS.fullmatch(name):
        return "embeddings"
    if re.search(r"scale_shift_table|modulation", name):
        return "modulation tables"
    if re.search(r"norm\w*\.(weight|gamma)$", name):
        return "norms"
    if ".experts." in name:
        return "experts of a mixture"
    return "convolutions" if re.search(r"(patch_embedding|x_embedder\.proj)\.weight$", name) else "others"
