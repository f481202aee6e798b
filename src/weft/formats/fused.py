"""Between layers as a model's makers have them, some of them fused, and the canonical ones that they stand for."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches

import torch
from torch import Tensor

from weft.errors import ModelError
from weft.formats.adapter_file import MAGNITUDE
from weft.formats.layers import CONVOLUTIONS, PRODUCTS, Layer
from weft.names.modules import Modules, Rows

MLP_RATIO = 4  # of HunyuanVideo: the width of its MLPs over that of the network


def canonical_layers(layers: Iterable[Layer], kind: str, modules: Modules) -> list[Layer]:
    """Layers with official or canonical names under canonical ones. Of a fused layer each part has the same inner
    factor and its own rows of the outer one, without components that add nothing to it; a part to which nothing is
    added is left out. Raises ModelError for a fused LoKr, sizes that cannot be, and a layer that comes twice."""
    cut = [part for layer in layers for part in _cut(layer, kind, modules)]
    names = [part.name for part in cut]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ModelError(f"'{twice[0]}' is changed twice, by layers under two of its names.")
    return cut


def official_layers(layers: Iterable[Layer], kind: str, modules: Modules) -> list[Layer]:
    """Canonical layers under official names. Those that the makers fuse share the inner factor when it is the same for
    all; else their factors stand in blocks side by side, the rank is the sum of theirs, and the scale stays. What is
    not adapted of a fused layer is rows of zeros. Raises ModelError for what cannot be fused."""
    layers = list(layers)
    unknown = next((layer.name for layer in layers if layer.name not in modules.official), None)
    if unknown is not None:
        near = get_close_matches(unknown, list(modules.official), n=1, cutoff=0)[0]
        raise ModelError(
            f"'{unknown}' is no module of {modules.family} that other programs have a name for. Did you mean '{near}'?"
        )
    groups: dict[str, dict[str, Layer]] = {}
    for layer in layers:
        groups.setdefault(modules.official[layer.name], {})[layer.name] = layer
    mlp = _mlp_width(layers)
    in_order = {
        name: {path: group[path] for path in modules.parts[name] if path in group} for name, group in groups.items()
    }
    return [_fused(name, group, kind, modules, mlp) for name, group in in_order.items()]


# ---- From fused ones ----------------------------------------------------------------------------------------------


def _cut(layer: Layer, kind: str, modules: Modules) -> list[Layer]:
    if layer.name in modules.official:
        return [layer]
    paths = modules.parts[layer.name]
    if len(paths) == 1 and (modules.family == "wan" or CONVOLUTIONS.search(layer.name)):
        return [replace(layer, name=paths[0])]
    if kind == "lokr":
        if len(paths) == 1 and not layer.name.startswith("final_layer.ada"):
            return [replace(layer, name=paths[0])]
        raise ModelError(_NO_LOKR.format(layer.name, ", ".join(paths)))
    inner, outer = PRODUCTS[kind][0]
    out, width = len(layer.tensors[outer]), layer.tensors[inner].shape[1]
    rows = modules.rows(layer.name, out, width)
    _refuse_sizes(layer.name, rows, out)
    if len(paths) == 1:
        tensors = {end: _taken(tensor, rows[paths[0]]) if _has_rows(end, kind) else tensor
                   for end, tensor in layer.tensors.items()}  # fmt: skip
        return [replace(layer, name=paths[0], tensors=tensors)]
    parts = [_part(layer, path, rows[path], kind) for path in paths]
    if not any(_adds(part, kind) for part in parts):
        return parts
    return [_narrowed(part, kind) for part in parts if _adds(part, kind) or MAGNITUDE in part.tensors]


_NO_LOKR = "'{}' is {} in one, and a LoKr of all of it cannot be divided among them."


def _has_rows(end: str, kind: str) -> bool:
    return end == MAGNITUDE or end in [outer for _, outer in PRODUCTS[kind]]


def _taken(tensor: Tensor, rows: Rows) -> Tensor:
    return torch.cat([tensor[start:stop] for start, stop in rows]) if rows else tensor


def _part(layer: Layer, path: str, rows: Rows, kind: str) -> Layer:
    tensors = {end: _taken(tensor, rows) if _has_rows(end, kind) else tensor.clone()
               for end, tensor in layer.tensors.items()}  # fmt: skip
    return replace(layer, name=path, tensors=tensors)


def _adds(part: Layer, kind: str) -> bool:
    return all(bool(part.tensors[outer].ne(0).any()) for _, outer in PRODUCTS[kind])


def _narrowed(part: Layer, kind: str) -> Layer:
    """Without the components whose column in every outer factor is zero, but for one."""
    used = torch.stack([part.tensors[outer].ne(0).any(0) for _, outer in PRODUCTS[kind]]).any(0)  # (rank,)
    if used.all():
        return part
    if not used.any():
        used[0] = True
    tensors = dict(part.tensors)
    for inner, outer in PRODUCTS[kind]:
        tensors[inner], tensors[outer] = tensors[inner][used], tensors[outer][:, used]
    return replace(part, tensors=tensors)


def _refuse_sizes(name: str, rows: Mapping[str, Rows], out: int) -> None:
    ends = [pair for ranges in rows.values() for pair in ranges]
    if any(start >= stop or stop > out for start, stop in ends) or (
        ends and sum(stop - start for start, stop in ends) != out
    ):
        raise ModelError(f"'{name}' has {out} outputs, which cannot be divided among {', '.join(rows)}.")


# ---- To fused ones ------------------------------------------------------------------------------------------------


def _fused(name: str, group: Mapping[str, Layer], kind: str, modules: Modules, mlp: int | None) -> Layer:
    paths, parts = modules.parts[name], list(group.values())
    if len(paths) == 1 and (modules.family == "wan" or CONVOLUTIONS.search(name)):
        return replace(parts[0], name=name)
    if kind == "lokr":
        if len(paths) == 1 and not name.startswith("final_layer.ada"):
            return replace(parts[0], name=name)
        raise ModelError(
            f"other programs fuse {', '.join(paths)} into '{name}', and LoKrs of them make none of it together. "
            "Write --to peft."
        )
    inner, outer = PRODUCTS[kind][0]
    width = parts[0].tensors[inner].shape[1]
    rows = modules.rows(name, _outputs(name, group, paths, outer, mlp), width)
    for path, layer in group.items():
        if len(layer.tensors[outer]) != sum(stop - start for start, stop in rows[path]) and rows[path]:
            raise ModelError(
                f"'{path}' has {len(layer.tensors[outer])} outputs, and as a part of '{name}' on {width} inputs it "
                f"would have {sum(stop - start for start, stop in rows[path])}."
            )
    shared = all(_same_inner(parts[0], part, kind) for part in parts)
    out = sum(stop - start for ranges in rows.values() for start, stop in ranges) or len(parts[0].tensors[outer])
    tensors: dict[str, Tensor] = {}
    for inner, outer in PRODUCTS[kind]:
        tensors[inner] = parts[0].tensors[inner] if shared else torch.cat([part.tensors[inner] for part in parts])
        tensors[outer] = _outer(group, outer, rows, out, shared)
    if any(MAGNITUDE in part.tensors for part in parts):
        if len(group) < len(paths):
            missing = next(path for path in paths if path not in group)
            raise ModelError(f"'{name}' has one DoRA for {', '.join(paths)}, and '{missing}' is not adapted here.")
        tensors[MAGNITUDE] = _placed([(group[p].tensors[MAGNITUDE], rows[p]) for p in paths], out)
    return Layer(name, tensors, parts[0].scale)


def _outputs(name: str, group: Mapping[str, Layer], paths: Sequence[str], outer: str, mlp: int | None) -> int:
    """Of the fused layer. q, k and v are as wide as the network, the MLP's part as any other of its kind here."""
    if len(paths) == 1:
        return len(group[paths[0]].tensors[outer])
    width = next(iter(group.values())).tensors[_INNER_OF[outer]].shape[1]
    if ".linear1" not in name:
        return len(paths) * width
    own = group.get(paths[-1])
    return 3 * width + (len(own.tensors[outer]) if own is not None else (mlp or MLP_RATIO * width))


_INNER_OF = {outer: inner for pairs in PRODUCTS.values() for inner, outer in pairs}


def _mlp_width(layers: Iterable[Layer]) -> int | None:
    """Outputs of the MLP's first layer in blocks with one stream, from any adapted layer that shows it."""
    for layer in layers:
        ends = next((pair for pairs in PRODUCTS.values() for pair in pairs if pair[0] in layer.tensors), None)
        if ends is None or not layer.name.startswith("single_transformer_blocks."):
            continue
        a, b = (layer.tensors[end] for end in ends)
        if layer.name.endswith(".proj_mlp"):
            return len(b)
        if layer.name.endswith(".proj_out"):
            return a.shape[1] - len(b)
    return None


def _same_inner(one: Layer, other: Layer, kind: str) -> bool:
    return all(
        one.tensors[inner].shape == other.tensors[inner].shape and torch.equal(one.tensors[inner], other.tensors[inner])
        for inner, _ in PRODUCTS[kind]
    )


def _outer(group: Mapping[str, Layer], end: str, rows: Mapping[str, Rows], out: int, shared: bool) -> Tensor:
    """(out, rank), each part in its rows, and where the inner factors differ in columns of its own."""
    if shared:
        return _placed([(layer.tensors[end], rows[path]) for path, layer in group.items()], out)
    total, column, pieces = sum(layer.rank for layer in group.values()), 0, []
    for path, layer in group.items():
        wide = layer.tensors[end].new_zeros(len(layer.tensors[end]), total)
        wide[:, column : column + layer.rank] = layer.tensors[end]
        column += layer.rank
        pieces.append((wide, rows[path]))
    return _placed(pieces, out)


def _placed(pieces: Sequence[tuple[Tensor, Rows]], out: int) -> Tensor:
    """Rows of the canonical layers at their places in the official one, the others zero."""
    first = pieces[0][0]
    whole = first.new_zeros(out, *first.shape[1:])
    for tensor, rows in pieces:
        at = 0
        for start, stop in rows or ((0, out),):
            whole[start:stop] = tensor[at : at + stop - start]
            at += stop - start
    return whole
