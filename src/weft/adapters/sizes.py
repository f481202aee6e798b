"""How large the change is that an adapter makes of each layer, and how many directions it has, whatever its kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn

from weft.adapters.full import FullChange
from weft.adapters.full_rank import WEIGHT
from weft.adapters.loha import LoHa
from weft.adapters.lokr import LoKr
from weft.adapters.lora import Lora
from weft.adapters.low_rank import FIRST_A, MAGNITUDE, A, B, without_first
from weft.adapters.modules import plain_weight, rows_are_readable
from weft.adapters.oft import Oft
from weft.adapters.recipe import Recipe
from weft.math.sharded import held, whole, whole_rows
from weft.math.spectrum import (
    effective_rank,
    gram,
    norm_of_product,
    rotation_less_one,
    row_squares,
    values_of_product,
)

WIDEST = 256  # side of a matrix beyond which its singular values would cost more than the saving beside them
NUMBERS = 1 << 22  # of a weight that are looked at together


@dataclass(frozen=True)
class Adapted:
    """A frozen layer, and the tensors of one adapter on it by the ends of their names; all may lie in shards."""

    base: nn.Module
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Of the change dW that an adapter makes of one layer's weight: ||dW||_F, and the effective rank, None where that
    asks for a larger decomposition than WIDEST."""

    norm: float
    effective_rank: float | None = None


@dataclass(frozen=True)
class _Product:
    """A matrix B A by B'B and A A', both (r, r) in fp64 on the host."""

    gram_b: Tensor
    gram_a: Tensor

    @classmethod
    def of(cls, b: Tensor, a: Tensor, scale: float = 1.0) -> "_Product":
        return cls(scale**2 * gram(b.mT).cpu(), gram(a).cpu())

    @property
    def is_finite(self) -> bool:
        return bool(self.gram_b.isfinite().all() and self.gram_a.isfinite().all())


@torch.no_grad()
def weight_norm(layer: nn.Module) -> float:
    """||W||_F of a frozen layer. Of a sharded one every process must ask; each looks at its own rows."""
    weight = layer._parameters.get("weight")
    if weight is not None and weight is not held(weight) and rows_are_readable(layer):
        rows = whole_rows(weight, row_squares(held(weight), NUMBERS))
    else:
        rows = row_squares(plain_weight(layer), NUMBERS)
    return float(rows.cpu().double().sum().sqrt())


@singledispatch
def sizes(recipe: Recipe, adapted: Mapping[str, Adapted]) -> dict[str, Size]:
    """The change of each layer by its path, as the network makes it: scale included. Where tensors are sharded every
    process must ask. Empty for a kind that is not known here."""
    return {}


@sizes.register
@torch.no_grad()
def _sizes_of_lora(recipe: Lora, adapted: Mapping[str, Adapted]) -> dict[str, Size]:
    if recipe.dora:
        return {path: Size(_dora_norm(recipe, layer)) for path, layer in adapted.items()}
    products: dict[str, _Product | Size] = {}
    for path, layer in adapted.items():
        tensors = {end: whole(tensor) for end, tensor in layer.tensors.items()}
        _, scale = recipe.width(tensors[A].dim() > 2)
        pair = without_first(tensors) if FIRST_A in tensors else tensors
        products[path] = _Product.of(pair[B].flatten(1), pair[A].flatten(1), scale)
    return _sizes_of(products)


@sizes.register
@torch.no_grad()
def _sizes_of_loha(recipe: LoHa, adapted: Mapping[str, Adapted]) -> dict[str, Size]:
    found: dict[str, _Product | Size] = {}
    for path, layer in adapted.items():
        w1_a, w1_b, w2_a, w2_b = (whole(layer.tensors[f".{name}"]) for name in recipe.tensors)
        if recipe.rank**2 > WIDEST:
            found[path] = Size(recipe.scale * _norm_of_hadamard(w1_a, w1_b, w2_a, w2_b))
            continue
        # Number by number, a product of two low-rank matrices is one of all pairs of their directions.
        b = (w1_a.unsqueeze(2) * w2_a.unsqueeze(1)).flatten(1)  # (out, r^2)
        a = (w1_b.unsqueeze(1) * w2_b.unsqueeze(0)).flatten(0, 1)  # (r^2, in)
        found[path] = _Product.of(b, a, recipe.scale)
    return _sizes_of(found)


@sizes.register
@torch.no_grad()
def _sizes_of_lokr(recipe: LoKr, adapted: Mapping[str, Adapted]) -> dict[str, Size]:
    first, second = (_sizes_of({path: _half(at, name) for path, at in adapted.items()}) for name in ("w1", "w2"))
    found = {}
    for path in adapted:
        # The singular values of a Kronecker product are all products of the two's, and their entropies add up.
        ranks = first[path].effective_rank, second[path].effective_rank
        both = None if ranks[0] is None or ranks[1] is None else ranks[0] * ranks[1]
        found[path] = Size(recipe.scale * first[path].norm * second[path].norm, both)
    return found


@sizes.register
@torch.no_grad()
def _sizes_of_oft(recipe: Oft, adapted: Mapping[str, Adapted]) -> dict[str, Size]:
    found = {}
    for path, layer in adapted.items():
        weight, (angles,) = plain_weight(layer.base), layer.tensors.values()
        turn = rotation_less_one(whole(angles), recipe.block_size, recipe.series).to(weight.device, torch.float32)
        squares = 0.0
        for rows in _some(weight, weight.shape[1]):
            blocks = rows.float().unflatten(1, (-1, recipe.block_size))  # (rows, blocks, size)
            squares += float(torch.einsum("obi,bji->obj", blocks, turn.expand(blocks.shape[1], -1, -1)).square().sum())
        found[path] = Size(squares**0.5)
    return found


@sizes.register
@torch.no_grad()
def _sizes_of_full(recipe: FullChange, adapted: Mapping[str, Adapted]) -> dict[str, Size]:
    return {path: _size_of(whole(layer.tensors[WEIGHT]).flatten(1)) for path, layer in adapted.items()}


def _half(layer: Adapted, name: str) -> _Product | Size:
    """One factor of a LoKr, which is whole or a product itself."""
    tensors = {end.removeprefix(f".lokr_{name}"): whole(tensor) for end, tensor in layer.tensors.items()}
    return _size_of(tensors[""]) if "" in tensors else _Product.of(tensors["_a"], tensors["_b"])


def _sizes_of(matrices: Mapping[str, _Product | Size]) -> dict[str, Size]:
    """Of each matrix; of products of one rank all together."""
    found: dict[str, Size] = {}
    by_rank: dict[int, dict[str, _Product]] = {}
    for path, matrix in matrices.items():
        if isinstance(matrix, Size):
            found[path] = matrix
        elif len(matrix.gram_a) > WIDEST or not matrix.is_finite:
            found[path] = Size(float(norm_of_product(matrix.gram_b, matrix.gram_a)))
        else:
            by_rank.setdefault(len(matrix.gram_a), {})[path] = matrix
    for products in by_rank.values():
        gram_b = torch.stack([product.gram_b for product in products.values()])
        gram_a = torch.stack([product.gram_a for product in products.values()])
        norms, ranks = norm_of_product(gram_b, gram_a), effective_rank(values_of_product(gram_b, gram_a))
        found |= {path: Size(*both) for path, *both in zip(products, norms.tolist(), ranks.tolist(), strict=True)}
    return {path: found[path] for path in matrices}


def _size_of(matrix: Tensor) -> Size:
    norm = float(row_squares(matrix, NUMBERS).cpu().double().sum().sqrt())
    if min(matrix.shape) > WIDEST or not matrix.isfinite().all():
        return Size(norm)
    return Size(norm, float(effective_rank(torch.linalg.svdvals(matrix.to("cpu", torch.float64)))))


def _norm_of_hadamard(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> float:
    """||(w1_a w1_b) * (w2_a w2_b)||_F, some rows at a time."""
    parts = zip(*(_some(rows, w1_b.shape[1]) for rows in (w1_a, w2_a)), strict=True)
    return sum(float(((one @ w1_b) * (two @ w2_b)).square().sum()) for one, two in parts) ** 0.5


def _dora_norm(recipe: Lora, layer: Adapted) -> float:
    """||m (W + s B A) / ||W + s B A|| - W||_F, the norms inside those of rows. arXiv:2402.09353, eq. 5."""
    weight = plain_weight(layer.base)
    a, b, magnitude = (whole(layer.tensors[end]).to(weight.device) for end in (A, B, MAGNITUDE))
    squares = 0.0
    parts = (_some(tensor, weight.shape[1]) for tensor in (weight, b, magnitude))
    for w, up, length in zip(*parts, strict=True):
        moved = w.float() + recipe.scale * (up @ a)
        moved = moved * (length / torch.linalg.vector_norm(moved, dim=1)).unsqueeze(1)
        squares += float((moved - w.float()).square().sum())
    return squares**0.5


def _some(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    """Rows in parts, each for about NUMBERS numbers of a matrix of that width."""
    return rows.split(max(1, NUMBERS // width))
