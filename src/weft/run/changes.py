"""What an adapter changes of each layer, whatever its kind: numbers to compare two files by, and a changed weight.

A LoRA's change is kept as its two factors, so that two are compared without forming a matrix (out, in).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from weft.formats.adapter_file import MAGNITUDE, A, B, SavedAdapter
from weft.math.spectrum import rotation_less_one


@dataclass(frozen=True)
class Change:
    """The change of one layer's weight W (out, in) or (out, in, *kernel), in fp64; one of the first three is there.

    factors: (out, r) with the scale, and (r, in * kernel), whose product it is. whole: the change itself. rotation:
    R - I (blocks, size, size) of the blocks of inputs that are rotated, W' = W R'. magnitude: DoRA's lengths of the
    rows of W', (out,).
    """

    factors: tuple[Tensor, Tensor] | None = None
    whole: Tensor | None = None
    rotation: Tensor | None = None
    magnitude: Tensor | None = None
    kernel: tuple[int, ...] = ()

    def delta(self) -> Tensor:
        """dW (out, in, *kernel) in fp32, of a change that does not depend on W: no DoRA, no rotation."""
        assert self.rotation is None and self.magnitude is None, "this change depends on the weight"
        return self._added().float()

    def applied(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """W' (out, in, *kernel) in fp32. Raises ValueError for another strength than 1 of DoRA or a rotation."""
        if strength != 1 and (self.rotation is not None or self.magnitude is not None):
            raise ValueError("a DoRA or OFT is applied as it was trained")
        wide = weight.float()
        if self.rotation is not None:
            return _rotated(wide, self.rotation)
        made = wide + strength * self._added().float().view_as(wide)
        if self.magnitude is None:
            return made
        # Liu et al. 2024, arXiv:2402.09353, eq. 5: rows of the direction V + dV are brought to the learned lengths.
        lengths = made.flatten(1).norm(dim=1)
        return made * (self.magnitude.float() / lengths).view(-1, *(1,) * (made.dim() - 1))

    def _added(self) -> Tensor:
        if self.factors is not None:
            b, a = self.factors
            made = b @ a
        else:
            assert self.whole is not None
            made = self.whole
        return made.view(len(made), -1, *self.kernel) if self.kernel else made


def change_of(adapter: SavedAdapter, path: str) -> Change:
    """The change of one adapted layer."""
    kinds = {"lora": _of_lora, "loha": _of_loha, "lokr": _of_lokr, "oft": _of_oft}
    return kinds[adapter.kind](adapter, path)


def changes_of(adapter: SavedAdapter) -> Iterator[tuple[str, Change]]:
    """The change of each adapted layer, by its path."""
    for path in adapter.paths:
        yield path, change_of(adapter, path)


def difference(one: Change, other: Change) -> float:
    """||one - other||_F / ||one||_F, with DoRA the larger one of that and of the same of the magnitudes; inf where they
    are of different kinds or sizes, 0 for two changes by nothing."""
    if (one.magnitude is None) != (other.magnitude is None) or (one.rotation is None) != (other.rotation is None):
        return inf
    if one.rotation is not None and other.rotation is not None:
        return _relative(one.rotation, other.rotation)
    lengths = 0.0
    if one.magnitude is not None and other.magnitude is not None:
        lengths = _relative(one.magnitude, other.magnitude)
    if one.factors is None or other.factors is None:
        return max(lengths, _relative(one._added().flatten(1), other._added().flatten(1)))
    (b1, a1), (b2, a2) = one.factors, other.factors
    if len(b1) != len(b2) or a1.shape[1] != a2.shape[1]:
        return inf
    if a1.shape == a2.shape and torch.equal(a1, a2):
        return max(lengths, _ratio(norm(b2 - b1, a1), norm(b1, a1)))
    if b1.shape == b2.shape and torch.equal(b1, b2):
        return max(lengths, _ratio(norm(b1, a2 - a1), norm(b1, a1)))
    return max(lengths, _ratio(norm(torch.cat((b1, -b2), 1), torch.cat((a1, a2))), norm(b1, a1)))


def norm(b: Tensor, a: Tensor) -> float:
    """||B A||_F by the triangles of two QR decompositions, so that nothing is squared that cancels."""
    return float((torch.linalg.qr(b, mode="r")[1] @ torch.linalg.qr(a.mT, mode="r")[1].mT).norm())


def _of_lora(adapter: SavedAdapter, path: str) -> Change:
    a, b = adapter.tensors[path + A].double(), adapter.tensors[path + B].double()
    magnitude = adapter.tensors.get(path + MAGNITUDE)
    return Change(
        factors=(adapter.scale_at(path) * b.flatten(1), a.flatten(1)),
        magnitude=None if magnitude is None else magnitude.double().flatten(),
        kernel=tuple(a.shape[2:]),
    )


def _of_loha(adapter: SavedAdapter, path: str) -> Change:
    w1_a, w1_b, w2_a, w2_b = (adapter.tensors[f"{path}.hada_{n}"].double() for n in ("w1_a", "w1_b", "w2_a", "w2_b"))
    return Change(whole=adapter.scale * (w1_a @ w1_b) * (w2_a @ w2_b))


def _of_lokr(adapter: SavedAdapter, path: str) -> Change:
    def half(name: str) -> Tensor:
        own = adapter.tensors.get(f"{path}.lokr_{name}")
        if own is not None:
            return own.double()
        return adapter.tensors[f"{path}.lokr_{name}_a"].double() @ adapter.tensors[f"{path}.lokr_{name}_b"].double()

    return Change(whole=adapter.scale * torch.kron(half("w1"), half("w2")))


def _of_oft(adapter: SavedAdapter, path: str) -> Change:
    options = adapter.options
    series = int(options["num_cayley_neumann_terms"]) if options["use_cayley_neumann"] else None
    return Change(
        rotation=rotation_less_one(adapter.tensors[f"{path}.oft_R.weight"], int(options["oft_block_size"]), series)
    )


def _rotated(weight: Tensor, rotation: Tensor) -> Tensor:
    size = rotation.shape[-1]
    flat = weight.flatten(1)
    blocks = rotation.expand(flat.shape[1] // size, size, size).float()
    turned = torch.einsum("obi,bji->obj", flat.view(len(flat), -1, size), blocks)
    return weight + turned.reshape_as(weight)


def _relative(one: Tensor, other: Tensor) -> float:
    return inf if one.shape != other.shape else _ratio(float((other - one).norm()), float(one.norm()))


def _ratio(difference: float, whole: float) -> float:
    if difference == 0:
        return 0.0
    return difference / whole if whole else inf
