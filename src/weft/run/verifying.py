"""Whether two adapters change a network alike, layer by layer; and whether a written file does what its source did."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch

from weft.formats.adapter_file import ENDS, SavedAdapter
from weft.formats.consumers import use_of
from weft.formats.use import Delta, Use
from weft.math.spectrum import gram, norm_of_product
from weft.names.modules import FAMILIES, family_of, modules
from weft.run.changes import Change, change_of, difference

TOLERANCE = 1e-6  # relative, of fp32 files: a product of two roundings to 24 bits is off by less than 2e-7
OTHER_DORA = (
    "it divides the rows of a DoRA by the lengths of the base's rows, where PEFT, which trained it, divides by the "
    "lengths of the rows with their change. Write --to peft, or merge it: weft merge ADAPTER --into BASE."
)
FINE = 1e-7  # below this a difference told by squares is their rounding


@dataclass(frozen=True)
class Verified:
    """How far two adapters, or a source and what a program makes of its file, are apart.

    differences: a layer's path -> ||one - other|| / ||one||. alone: layers that are changed in one of the two alone.
    ignored: keys that the program passes over. faults: why it stops, or computes something else.
    """

    program: str
    differences: Mapping[str, float]
    tolerance: float
    alone: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    @property
    def largest(self) -> float:
        return max(self.differences.values(), default=0.0)

    @property
    def is_equal(self) -> bool:
        """Whether the program does with the file what the source did, within the tolerance."""
        beyond = not all(apart <= self.tolerance for apart in self.differences.values())  # NaN is beyond too
        return not (self.alone or self.ignored or self.faults or beyond)

    def worst(self, count: int) -> list[tuple[str, float]]:
        """The layers that differ most and by more than the tolerance, worst first."""
        beyond = [(path, apart) for path, apart in self.differences.items() if not apart <= self.tolerance]
        return sorted(beyond, key=lambda each: -each[1])[:count]

    def receipt(self) -> str:
        """What a file's header says of its check, as JSON."""
        return json.dumps({"by": self.program, "largest": self.largest, "layers": len(self.differences)})


def check_export(path: Path, to: str, source: SavedAdapter, tolerance: float = TOLERANCE) -> Verified:
    """Compare what a program makes of a file with what its source changes. Raises ConfigError, ModelError."""
    family = model_of(source)
    use = use_of(to, path, family)
    faults = (*use.faults, OTHER_DORA) if source.dora and use.lengths_of_base else use.faults
    differences: dict[str, float] = {}
    alone = []
    wanted = set(source.paths)
    for layer, found in changes_in(use, family):
        if layer not in wanted:
            alone += [layer] if size(found()) > 0 else []
        elif layer in differences:
            differences[layer] = inf  # two modules of the program would stand for one layer
        else:
            differences[layer] = apart(change_of(source, layer), found())
    missing = [layer for layer in source.paths if layer not in differences]
    alone += [layer for layer in missing if size(change_of(source, layer)) > 0]
    return Verified(to, differences, tolerance, tuple(alone), use.ignored, faults)


def model_of(source: SavedAdapter) -> str:
    """The family whose layers these are; of names that several have, the one that the header says, or the first."""
    holding = [family for family in FAMILIES if all(path in modules(family).official for path in source.paths)]
    said = source.metadata.get("weft.family")
    return family_of(source.paths) or next((name for name in holding if name == said), (*holding, "causal-lm")[0])


def compare(one: SavedAdapter, other: SavedAdapter, tolerance: float = TOLERANCE) -> Verified:
    """Compare what two adapters change. A layer that only one of them has counts when it is changed there."""
    both = [path for path in one.paths if path in set(other.paths)]
    differences = {path: 0.0 if same(one, other, path) else apart(change_of(one, path), change_of(other, path))
                   for path in both}  # fmt: skip
    alone = [path for path in one.paths if path not in differences and size(change_of(one, path)) > 0]
    alone += [path for path in other.paths if path not in differences and size(change_of(other, path)) > 0]
    return Verified("weft", differences, tolerance, tuple(alone))


def same(one: SavedAdapter, other: SavedAdapter, path: str) -> bool:
    """Whether a layer of two LoRAs has the same numbers and scale, without computing anything."""
    if one.kind != "lora" or other.kind != "lora" or one.scale_at(path) != other.scale_at(path):
        return False
    pairs = [(one.tensors.get(path + end), other.tensors.get(path + end)) for end in ENDS["lora"]]
    return all(
        a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)) for a, b in pairs
    )


def changes_in(use: Use, family: str) -> Iterator[tuple[str, "Callable[[], Change]"]]:
    """Canonical path -> what the program does to that layer: of a module that is fused there, to its rows."""
    for module, found in use.layers.items():
        if use.canonical:
            yield module, lambda found=found: _change(found())
            continue
        delta = found()
        for path, rows in modules(family).rows(module, *delta.shape).items():
            yield path, lambda delta=delta, rows=rows: _change(delta.rows(rows))


def _change(delta: Delta) -> Change:
    return Change(delta.factors, delta.whole, delta.rotation, delta.magnitude, delta.kernel)


def apart(one: Change, other: Change) -> float:
    """`changes.difference`, for large layers at once: of factors by their Gram matrices, and only where those cannot
    tell a small difference from their own rounding by QR."""
    if one.factors is None or other.factors is None or one.rotation is not None or other.rotation is not None:
        return difference(one, other)
    if one.magnitude is not None or other.magnitude is not None:
        return difference(one, other)
    (b1, a1), (b2, a2) = one.factors, other.factors
    if len(b1) != len(b2) or a1.shape[1] != a2.shape[1]:
        return inf
    if a1.shape == a2.shape and torch.equal(a1, a2):
        b, a = b2 - b1, a1
    elif b1.shape == b2.shape and torch.equal(b1, b2):
        b, a = b1, a2 - a1
    else:
        b, a = torch.cat((b1, -b2), 1), torch.cat((a1, a2))
    between, whole = norm(b, a), norm(b1, a1)
    if between == 0:
        return 0.0
    told = between / whole if whole else inf
    if told != told:
        return inf
    return told if told > FINE or len(a) == len(a1) else min(told, difference(one, other))


def size(change: Change) -> float:
    """How large a change is: 0 where a layer is left as it was."""
    if change.rotation is not None:
        return float(change.rotation.norm())
    if change.magnitude is not None:
        return inf  # what it does depends on the weight
    if change.factors is not None:
        return norm(*change.factors)
    assert change.whole is not None
    return float(change.whole.norm())


def norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """||B A||_F of B (out, r) and A (r, in), by their Gram matrices (r, r)."""
    return float(norm_of_product(gram(b.mT), gram(a)))
