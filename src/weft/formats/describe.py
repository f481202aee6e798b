"""What an adapter file says of itself, from its header and config alone: for `weft show`. No tensors, no torch."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from typing import Any

from weft.errors import ModelError
from weft.formats.adapter_file import ENDS, MAGNITUDE, SOFT_PROMPTS, A, kind_in, paths_in, scale_of
from weft.formats.header import Header, read_header, read_numbers
from weft.formats.keys import ALPHA, Names, names_in
from weft.formats.sniff import (
    DIFFUSERS_PREFIX,
    PEFT_CONFIG,
    PEFT_PREFIX,
    Found,
    diffusers_config,
    is_plain,
    provenance,
    read_config,
    scale_beside,
    sniff,
)
from weft.formats.strangers import stranger
from weft.names.modules import FAMILIES, family_of, modules

# Of which tensor, and of its which axis, a layer's rank is.
IN_WEFT = {name: kind for kind, name in SOFT_PROMPTS.items()}  # of PEFT's words
WITHOUT_RANK = ("oft", "ia3", *SOFT_PROMPTS)
RANK_AT = ((A, 0), (".hada_w1_b", 0), (".lokr_w2_b", 0), (".lokr_w1_b", 0))


@dataclass(frozen=True)
class Description:
    """The facts of an adapter file. size: bytes of the weights file. parameters: numbers in all tensors."""

    format: str
    weights: Path
    kind: str  # lora, loha, lokr, oft, ia3, prompt, p-tuning or prefix
    rank: int  # the largest of all linear layers; 0 in OFT, which has none
    alpha: float  # of a layer of that rank
    rslora: bool
    dora: bool
    targets: tuple[str, ...]  # canonical paths of the adapted layers
    keys: tuple[str, ...]  # as they stand in the file
    dtypes: dict[str, int]  # safetensors' name of a dtype -> tensors that have it
    parameters: int
    metadata: dict[str, str]  # provenance
    size: int
    family: str | None = None  # wan, hunyuan-video or causal-lm, by the names of the layers
    expert: str | None = None  # high or low, of two
    tells_alpha: bool = True  # whether the file or its config does; without, other programs take scale 1
    ranks: Mapping[int, int] = field(default_factory=dict)  # of linear layers -> how many of the file's layers have it
    scales: tuple[float, ...] = ()  # those that there are, the smallest first

    @property
    def scale(self) -> float:
        """The factor before the change that other programs will use."""
        return scale_of(self.alpha, self.rank, self.rslora) if self.rank else 1.0


def describe(path: Path, expert: str | None = None) -> Description:
    """Describe an adapter folder or file. expert: of a file that holds both, the one to describe, high or low.

    Raises ModelError that names what is there in place of an adapter.
    """
    found = sniff(path)
    if found.weights.suffix != ".safetensors":
        raise ModelError(f"{found.weights} is a pickle, and what it holds cannot be told without loading it.")
    header = read_header(found.weights)
    if found.format == "peft" or (found.format == "diffusers" and is_plain(header.tensors)):
        return _with_config(found, header, path)
    return _with_alphas(found, header, expert)


def _with_config(found: Found, header: Header, path: Path) -> Description:
    """Of a file whose alpha stands in fields of PEFT's config."""
    if found.format == "peft":
        prefix, config = PEFT_PREFIX, read_config(found.weights.parent / PEFT_CONFIG)
    else:
        if other := stranger(header.tensors, header.metadata):
            raise ModelError(f"{path} is {other}. Weft reads those of Wan and HunyuanVideo.")
        prefix, config = DIFFUSERS_PREFIX, diffusers_config(header.metadata, path)
    kind = kind_in(header.tensors) or IN_WEFT.get(config.get("peft_type", ""))
    if kind is None:
        raise ModelError(f"{path} holds no LoRA weights.")
    rank, alpha = _width(kind, header, config)
    rslora = bool(config.get("use_rslora", False))
    shapes = {key.removeprefix(prefix): entry.shape for key, entry in header.tensors.items()}
    targets = _canonical(paths_in(shapes))
    return Description(
        kind=kind,
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        dora=bool(config.get("use_dora", False)) or any(MAGNITUDE in key for key in header.tensors),
        targets=targets,
        family=family_of(targets),
        expert=_expert(header),
        tells_alpha=bool(config),
        ranks=_ranks({p: {e: shapes[p + e] for e in ENDS.get(kind, ()) if p + e in shapes} for p in paths_in(shapes)}),
        scales=(scale_of(alpha, rank, rslora),) if rank else (),
        **_of_file(found, header),
    )


def _with_alphas(found: Found, header: Header, expert: str | None) -> Description:
    """Of a file whose alphas stand beside the layers, or nowhere."""
    names = names_in(header.tensors, header.metadata, found.weights, expert)
    entries = {
        name: {end: header.tensors[key].shape for (end, part), key in keys.items() if not part}
        for name, keys in names.modules.items()
    }
    ranks = {name: rank for name, shapes in entries.items() if (rank := _rank(shapes))}
    alphas = _alphas(found, header, names)
    told = bool(alphas)
    beside = scale_beside(found.weights)
    alphas = {name: alphas.get(name, (beside or 1) * rank) or float(rank) for name, rank in ranks.items()}
    scales = {name: alphas[name] / rank for name, rank in ranks.items()}
    # The scale of the first layer of the largest rank is that of the adapter, as when the file is read.
    linear = {name: rank for name, rank in ranks.items() if len(entries[name].get(A, (0, 0))) == 2} or ranks
    largest = max(linear, key=lambda name: linear[name], default=None)
    return Description(
        kind=names.kind,
        rank=linear[largest] if largest else 0,
        alpha=alphas[largest] if largest else 0.0,
        rslora=False,
        dora=any(end == MAGNITUDE for keys in names.modules.values() for end, _ in keys),
        targets=_canonical(tuple(names.modules)),
        family=names.family,
        expert=names.expert or _expert(header),
        tells_alpha=told or beside is not None,
        ranks=_ranks(entries),
        scales=_distinct(scales.values()),
        **_of_file(found, header),
    )


def _of_file(found: Found, header: Header) -> dict[str, Any]:
    return {
        "format": found.format,
        "weights": found.weights,
        "keys": tuple(header.tensors),
        "dtypes": dict(Counter(entry.dtype for entry in header.tensors.values())),
        "parameters": sum(entry.numbers for key, entry in header.tensors.items() if not key.endswith(ALPHA)),
        "metadata": provenance(header),
        "size": header.size,
    }


def _expert(header: Header) -> str | None:
    said = header.metadata.get("weft.expert")
    return said if said in ("high", "low") else None


def _alphas(found: Found, header: Header, names: Names) -> dict[str, float]:
    keys = {name: keys[ALPHA, None] for name, keys in names.modules.items() if (ALPHA, None) in keys}
    values = read_numbers(found.weights, {key: header.tensors[key] for key in keys.values()})
    return {name: values[key] for name, key in keys.items() if key in values}


def _canonical(names: Iterable[str]) -> tuple[str, ...]:
    """Canonical names of layers that may have official ones, of fused ones all that they stand for."""
    names = tuple(names)
    for known in map(modules, FAMILIES):
        if all(known.found(name) for name in names) and any(name in known.parts for name in names):
            return tuple(path for name in names for path in known.parts.get(known.found(name) or name, (name,)))
    return names


def _rank(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return next((shapes[end][axis] for end, axis in RANK_AT if len(shapes.get(end, ())) > axis), 0)


def _ranks(layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[int, int]:
    linear = (shapes for shapes in layers.values() if len(shapes.get(A, (0, 0))) == 2)
    return dict(sorted(Counter(rank for shapes in linear if (rank := _rank(shapes))).items()))


def _distinct(scales: Iterable[float]) -> tuple[float, ...]:
    """Numbers that differ by more than the rounding of an alpha in a file."""
    found: list[float] = []
    for scale in sorted(scales):
        if not found or not isclose(scale, found[-1], rel_tol=1e-6):
            found.append(float(f"{scale:.7g}"))
    return tuple(found)


def _width(kind: str, header: Header, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and alpha: a LoRA's rank is in the shapes, that of other kinds in the config alone."""
    if kind in WITHOUT_RANK:
        return 0, 0.0
    if kind != "lora":
        return int(config.get("r", 8)), float(config.get("alpha", 8))
    a = [entry.shape for key, entry in header.tensors.items() if key.endswith(A)]
    of_convolutions = max((shape[0] for shape in a if len(shape) > 2), default=0)
    rank = max((shape[0] for shape in a if len(shape) == 2), default=int(config.get("r", of_convolutions)))
    return rank, float(config.get("lora_alpha", config.get("r", rank)))
