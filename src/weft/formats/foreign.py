"""Read the adapter files of other programs: one safetensors file, whatever the names of its tensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from weft.errors import ModelError
from weft.formats.adapter_file import ENDS, MAGNITUDE, A, B, SavedAdapter, scale_of
from weft.formats.fused import canonical_layers
from weft.formats.header import Header, read_header
from weft.formats.keys import ALPHA, Names, names_in
from weft.formats.layers import CONVOLUTIONS, PATCH, Layer, adapter_of, layers_of, neat
from weft.formats.sizes import refuse_misfits
from weft.formats.sniff import diffusers_config, provenance, scale_beside
from weft.formats.tensor_file import read_tensors
from weft.names.modules import FAMILIES, modules

Keys = Mapping[tuple[str, int | None], str]  # of one module: canonical end, and which of several -> name in the file

HALVES = {"lora": (A, B), "loha": ENDS["loha"], "lokr": ()}


def read_foreign(weights: Path, expert: str | None = None) -> SavedAdapter:
    """Read a file. An alpha that is missing, or 0, means scale 1. expert: of a file that holds both, high or low.

    Raises ModelError for files of other models and tensors that are no adapter's, by their names.
    """
    header = read_header(weights)
    names = names_in(header.tensors, header.metadata, weights, expert)
    tensors, usual = read_tensors(weights), _usual_scale(weights, header, names)
    layers = [_layer(name, keys, tensors, names.kind, weights, usual) for name, keys in names.modules.items()]
    canonical = canonical_layers(layers, names.kind, modules(names.family))
    of_expert = {"weft.expert": names.expert} if names.expert else {}
    return adapter_of(names.kind, canonical, {**provenance(header), **of_expert})


def with_canonical_names(adapter: SavedAdapter) -> SavedAdapter:
    """An adapter that was trained on a network with its makers' names."""
    for known in map(modules, FAMILIES):
        official = [path for path in adapter.paths if path in known.parts and path not in known.official]
        if official and all(known.found(path) for path in adapter.paths):
            layers = canonical_layers(layers_of(adapter), adapter.kind, known)
            if adapter.kind != "oft":
                return adapter_of(adapter.kind, layers, adapter.metadata, adapter.options)
    return adapter


def _usual_scale(weights: Path, header: Header, names: Names) -> float:
    """Of layers without their own alpha: what PEFT's config beside them or diffusers' in the header says, or 1."""
    prefix = "transformer_2." if names.expert == "low" else "transformer."
    fields = diffusers_config(header.metadata, weights, prefix) if names.format == "diffusers" else {}
    if fields.get("alpha_pattern") or fields.get("rank_pattern"):
        raise ModelError(f"{weights} gives single layers their own alpha in its header, by other names than its own.")
    if "r" in fields:
        rank = int(fields["r"])
        return scale_of(float(fields.get("lora_alpha", rank)), rank, bool(fields.get("use_rslora", False)))
    return scale_beside(weights) or 1.0


def _layer(name: str, keys: Keys, tensors: Mapping[str, Tensor], kind: str, source: Path, usual: float) -> Layer:
    found = {place: tensors[key] for place, key in keys.items()}
    alpha = found.pop((ALPHA, None), None)
    parts = sorted({part for _, part in found if part is not None})
    each = [Layer(name, {e: t for (e, p), t in found.items() if p == part}) for part in parts or [None]]
    for layer in each:
        _refuse_half(layer, kind, keys, source)
        refuse_misfits(name, layer.tensors, source)
    layer = _beside(each) if parts else each[0]
    inner = each[0].rank
    scale = usual if alpha is None else _scale(alpha, inner, keys[ALPHA, None], source)
    return Layer(name, _shaped(layer, source), scale)


def _scale(alpha: Tensor, rank: int, key: str, source: Path) -> float:
    if alpha.numel() != 1:
        raise ModelError(f"{source}: '{key}' is an alpha of {alpha.numel()} numbers, and one was expected.")
    return neat(float(alpha.item()) / rank) if alpha.item() and rank else 1.0


def _refuse_half(layer: Layer, kind: str, keys: Keys, source: Path) -> None:
    wanted = HALVES[kind]
    if kind == "lokr":
        wanted = tuple(
            f".lokr_{half}{end}"
            for half in ("w1", "w2")
            for end in (("_a", "_b") if f".lokr_{half}" not in layer.tensors else ("",))
        )
    missing = [end for end in wanted if end not in layer.tensors]
    if missing:
        raise ModelError(
            f"{source} is incomplete: '{layer.name}' has no '{missing[0].strip('.')}' beside "
            f"'{next(iter(keys.values()))}'."
        )


def _beside(parts: list[Layer]) -> Layer:
    """musubi's split_dims, each a layer on a part of the rows of one module, as one layer of all their ranks."""
    a = torch.cat([part.tensors[A] for part in parts])
    return Layer(parts[0].name, {A: a, B: torch.block_diag(*(part.tensors[B] for part in parts)).to(a.dtype)})


def _shaped(layer: Layer, source: Path) -> dict[str, Tensor]:
    """Tensors with as many axes as their modules' weights have: some files have more or fewer for the same numbers."""
    tensors = dict(layer.tensors)
    if A in tensors:
        a, b = tensors[A], tensors[B]
        if CONVOLUTIONS.search(layer.name) and a.dim() == 2:
            a = a.view(len(a), -1, *PATCH)
        elif not CONVOLUTIONS.search(layer.name) and a.dim() > 2:
            if a[0].numel() != a.shape[1]:
                raise ModelError(f"{source}: '{layer.name}' is no convolution, and its lora_A is {tuple(a.shape)}.")
            a = a.flatten(1)
        tensors[A], tensors[B] = a, b.view(*b.shape[:2], *(1,) * (a.dim() - 2))
    if MAGNITUDE in tensors:
        out = len(tensors[B] if B in tensors else next(iter(tensors.values())))
        magnitude = tensors[MAGNITUDE]
        if len(magnitude) != out or magnitude.numel() != out:
            raise ModelError(
                f"{source}: the dora_scale of '{layer.name}' is {tuple(magnitude.shape)}, lengths of columns, and "
                f"DoRA in Weft has lengths of the {out} rows."
            )
        tensors[MAGNITUDE] = magnitude.flatten()
    return tensors
