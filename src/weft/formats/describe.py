"""What an adapter file says of itself, from its header and config alone: for `weft show`. No tensors, no torch."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import ModelError
from weft.formats.adapter_file import MAGNITUDE, A, kind_in, paths_in, scale_of
from weft.formats.header import Header, read_header
from weft.formats.sniff import (
    DIFFUSERS_PREFIX,
    PEFT_CONFIG,
    PEFT_PREFIX,
    diffusers_config,
    provenance,
    read_config,
    sniff,
)


@dataclass(frozen=True)
class Description:
    """The facts of an adapter file. size: bytes of the weights file. parameters: numbers in all tensors."""

    format: str
    weights: Path
    kind: str  # lora, loha, lokr or oft
    rank: int  # the largest of all linear layers; 0 in OFT, which has none
    alpha: float
    rslora: bool
    dora: bool
    targets: tuple[str, ...]  # paths of the adapted layers
    keys: tuple[str, ...]  # as they stand in the file
    dtypes: dict[str, int]  # safetensors' name of a dtype -> tensors that have it
    parameters: int
    metadata: dict[str, str]  # provenance
    size: int

    @property
    def scale(self) -> float:
        """The factor before the change that other programs will use."""
        return scale_of(self.alpha, self.rank, self.rslora) if self.rank else 1.0


def describe(path: Path) -> Description:
    """Describe an adapter folder or file. Raises ModelError that names what is there in place of an adapter."""
    found = sniff(path)
    if found.weights.suffix != ".safetensors":
        raise ModelError(f"{found.weights} is a pickle, and what it holds cannot be told without loading it.")
    header = read_header(found.weights)
    if found.format == "peft":
        prefix, config = PEFT_PREFIX, read_config(found.weights.parent / PEFT_CONFIG)
    else:
        prefix, config = DIFFUSERS_PREFIX, diffusers_config(header.metadata, path)
    kind = kind_in(header.tensors)
    if kind is None:
        raise ModelError(f"{path} holds no LoRA weights.")
    rank, alpha = _width(kind, header, config)
    return Description(
        format=found.format,
        weights=found.weights,
        kind=kind,
        rank=rank,
        alpha=alpha,
        rslora=bool(config.get("use_rslora", False)),
        dora=bool(config.get("use_dora", False)) or any(MAGNITUDE in key for key in header.tensors),
        targets=tuple(p.removeprefix(prefix) for p in paths_in(header.tensors)),
        keys=tuple(header.tensors),
        dtypes=dict(Counter(entry.dtype for entry in header.tensors.values())),
        parameters=sum(entry.numbers for entry in header.tensors.values()),
        metadata=provenance(header),
        size=header.size,
    )


def _width(kind: str, header: Header, config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and alpha: a LoRA's rank is in the shapes, that of other kinds in the config alone."""
    if kind == "oft":
        return 0, 0.0
    if kind != "lora":
        return int(config.get("r", 8)), float(config.get("alpha", 8))
    a = [entry.shape for key, entry in header.tensors.items() if key.endswith(A)]
    of_convolutions = max((shape[0] for shape in a if len(shape) > 2), default=0)
    rank = max((shape[0] for shape in a if len(shape) == 2), default=int(config.get("r", of_convolutions)))
    return rank, float(config.get("lora_alpha", config.get("r", rank)))
