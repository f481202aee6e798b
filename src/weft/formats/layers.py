"""The layers of an adapter one by one, each with its own rank and alpha, as the files of other programs have them."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import frexp, isqrt

import torch
from torch import Tensor
from torch.nn import functional

from weft.errors import ModelError
from weft.formats.adapter_file import ENDS, MAGNITUDE, A, B, SavedAdapter

W1_A, W1_B, W2_A, W2_B = ENDS["loha"]
# Of each product the inner factor (rank, in) and the outer one (out, rank).
PRODUCTS: Mapping[str, tuple[tuple[str, str], ...]] = {"lora": ((A, B),), "loha": ((W1_B, W1_A), (W2_B, W2_A))}

CONVOLUTIONS = re.compile(r"(^|\.)(patch_embedding|x_embedder\.proj|img_in\.proj)$")
PATCH = (1, 2, 2)  # their kernels: frames, height, width of a patch, in Wan and HunyuanVideo

ROUNDING = 2.0**-23  # relative, of an alpha in a file: it lies there as fp32
SAME = 4 * ROUNDING  # scales that are this close to one another are one


@dataclass(frozen=True)
class Layer:
    """What an adapter has on one module, by an official or canonical name: tensors by their canonical ends, and the
    factor before the change."""

    name: str
    tensors: Mapping[str, Tensor]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Inner width; of a LoKr that of w2, or of w1; 0 where both are whole."""
        for end, axis in ((A, 0), (W1_B, 0), (".lokr_w2_b", 0), (".lokr_w1_b", 0)):
            if end in self.tensors:
                return self.tensors[end].shape[axis]
        return 0

    @property
    def alpha(self) -> float:
        """With which alpha / rank is the scale."""
        return tidy(self.scale * self.rank)


def layers_of(adapter: SavedAdapter) -> Iterator[Layer]:
    """The layers under their canonical names, a LoRA's without the zeros that fill up its rank."""
    for path in adapter.paths:
        tensors = {end: adapter.tensors[path + end] for end in ENDS[adapter.kind] if path + end in adapter.tensors}
        if adapter.kind == "lora":
            yield _without_padding(Layer(path, tensors, adapter.scale_at(path)))
        else:
            yield Layer(path, tensors, adapter.scale)


def trimmed(adapter: SavedAdapter) -> Iterator[tuple[str, Tensor, Tensor, float, Tensor | None]]:
    """Of a LoRA the path, A (rank, in, *kernel), B (out, rank, 1, ...), the factor before B A and DoRA's magnitude of
    each layer, at its own rank."""
    for layer in layers_of(adapter):
        yield layer.name, layer.tensors[A], layer.tensors[B], layer.scale, layer.tensors.get(MAGNITUDE)


def adapter_of(
    kind: str, layers: Iterable[Layer], metadata: Mapping[str, str], options: Mapping[str, object] | None = None
) -> SavedAdapter:
    """One adapter of layers with canonical names: ranks are filled up with zeros, and scales that differ are taken into
    the weights, which changes no output. Raises ModelError for a LoKr of which PEFT could make no layers."""
    layers = list(layers)
    if kind == "lokr":
        return _lokr_of(layers, metadata, options)
    linear = [layer for layer in layers if _inner(layer, kind).dim() == 2]
    convolutions = [layer for layer in layers if _inner(layer, kind).dim() > 2]
    even, rank, alpha = _evened(linear or convolutions, kind)
    conv = _evened(convolutions, kind) if convolutions else None
    by_name = {layer.name: layer for layer in [*even, *(conv[0] if conv else ())]}
    ordered = [by_name[layer.name] for layer in layers]
    tensors = {layer.name + end: tensor for layer in ordered for end, tensor in layer.tensors.items()}
    return SavedAdapter(
        tensors,
        rank,
        alpha,
        dora=any(MAGNITUDE in layer.tensors for layer in layers),
        targets=tuple(layer.name for layer in layers),
        metadata=dict(metadata),
        kind=kind,
        conv_rank=conv[1] if conv else None,
        conv_alpha=conv[2] if conv else None,
        options=dict(options or {}),
    )


def multiplied(tensor: Tensor, factor: float) -> Tensor:
    """A tensor times a number without loss: in fp32, where a narrower dtype could not hold the products as exactly."""
    if factor == 1:
        return tensor
    exact = abs(frexp(factor)[0]) == 0.5  # a power of two
    return (tensor if exact or tensor.dtype in (torch.float32, torch.float64) else tensor.float()) * factor


def neat(scale: float) -> float:
    """An alpha over a rank as it was meant, where the alpha was rounded to fp32 in a file: the fraction that it is."""
    fraction = float(Fraction(scale).limit_denominator(256))  # coarse enough that no root of rsLoRA's is taken for one
    return fraction if abs(fraction - scale) < ROUNDING * abs(scale) else scale


def tidy(number: float) -> float:
    """Without the last digits, where 24 x (1 / 24) would show 1 plus a rounding error."""
    return float(f"{number:.9g}")


# ---- One rank and one scale ---------------------------------------------------------------------------------------


def _inner(layer: Layer, kind: str) -> Tensor:
    return layer.tensors[PRODUCTS[kind][0][0]]


def _evened(layers: Sequence[Layer], kind: str) -> tuple[list[Layer], int, float]:
    """The layers at the rank and the scale of the first one of the largest rank; that rank, and the alpha."""
    largest = max(layers, key=lambda layer: layer.rank)
    return [_even(layer, kind, largest) for layer in layers], largest.rank, largest.alpha


def _even(layer: Layer, kind: str, largest: Layer) -> Layer:
    tensors, more = dict(layer.tensors), largest.rank - layer.rank
    ratio = layer.scale / largest.scale if largest.scale else 1.0
    if abs(ratio - 1) > SAME:
        first = B if kind == "lora" else W1_B
        tensors[first] = multiplied(tensors[first], ratio)
    for inner, outer in PRODUCTS[kind] if more else ():
        a, b = tensors[inner], tensors[outer]
        tensors[inner] = functional.pad(a, (0, 0) * (a.dim() - 1) + (0, more))
        tensors[outer] = functional.pad(b, (0, 0) * (b.dim() - 2) + (0, more))
    return replace(layer, tensors=tensors, scale=largest.scale)


def _without_padding(layer: Layer) -> Layer:
    a, b = layer.tensors[A], layer.tensors[B]
    used = a.flatten(1).ne(0).any(1) | b.flatten(1).ne(0).any(0)  # (rank,); B of a convolution is (out, rank, 1, ...)
    last = int(used.nonzero().max()) + 1 if used.any() else 1
    if last == len(a):
        return layer
    return replace(layer, tensors={**layer.tensors, A: a[:last].contiguous(), B: b[:, :last].contiguous()})


# ---- LoKr ---------------------------------------------------------------------------------------------------------


def without_scale(layer: Layer) -> Layer:
    """A LoKr's layer with its scale taken into w1, as other programs have none where both matrices are whole."""
    end = ".lokr_w1" if ".lokr_w1" in layer.tensors else ".lokr_w1_b"
    return replace(layer, tensors={**layer.tensors, end: multiplied(layer.tensors[end], layer.scale)}, scale=1.0)


def _lokr_of(
    layers: Sequence[Layer], metadata: Mapping[str, str], options: Mapping[str, object] | None
) -> SavedAdapter:
    """PEFT makes w2 whole where half its longer side is no more than the rank."""
    scales = {layer.scale for layer in layers}
    even = list(layers) if len(scales) == 1 else [without_scale(layer) for layer in layers]
    ranks = [layer.rank for layer in layers if layer.rank]
    whole = [layer.tensors[".lokr_w2"] for layer in layers if ".lokr_w2" in layer.tensors]
    rank = max(ranks) if ranks else max((max(w2.shape) + 1) // 2 for w2 in whole)
    tensors = {layer.name + end: tensor for layer in even for end, tensor in layer.tensors.items()}
    return SavedAdapter(
        tensors,
        rank,
        tidy(even[0].scale * rank),
        targets=tuple(layer.name for layer in layers),
        metadata=dict(metadata),
        kind="lokr",
        options=options or {"decompose_factor": _factor(layers), "decompose_both": _has_narrow_w1(layers)},
    )


def _has_narrow_w1(layers: Sequence[Layer]) -> bool:
    return any(".lokr_w1_a" in layer.tensors for layer in layers)


def _factor(layers: Sequence[Layer]) -> int:
    """The factor by which PEFT divides all sides as these layers have them. Raises ModelError when there is none."""
    sizes = [(_sides(layer, "w1"), _sides(layer, "w2")) for layer in layers]
    pairs = {(small, large) for w1, w2 in sizes for small, large in zip(w1, w2, strict=True)}
    for factor in (-1, *sorted({small for small, _ in pairs} | {max(pair) for pair in pairs})):
        if all(_divided(small * large, factor) == (small, large) for small, large in pairs):
            return factor
    raise ModelError(
        f"no one factor divides the layers of this LoKr as they are (w1 of '{layers[0].name}' is "
        f"{' x '.join(map(str, sizes[0][0]))}), so PEFT could not make them."
    )


def _sides(layer: Layer, name: str) -> tuple[int, int]:
    whole = layer.tensors.get(f".lokr_{name}")
    if whole is not None:
        return whole.shape[0], whole.shape[1]
    return layer.tensors[f".lokr_{name}_a"].shape[0], layer.tensors[f".lokr_{name}_b"].shape[1]


def _divided(length: int, factor: int) -> tuple[int, int]:
    """PEFT's rule (peft/tuners/lokr/layer.py, factorization)."""
    if factor > 0 and length % factor == 0:
        return factor, length // factor
    limit = isqrt(length) if factor < 0 else min(isqrt(length), factor)
    small = next(d for d in range(limit, 0, -1) if length % d == 0)
    return small, length // small
