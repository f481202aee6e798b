"""What an adapter file says of itself, from its header and config alone: for `weft show`. No tensors, no torch."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from weft.errors import ModelError
from weft.formats.adapter_file import MAGNITUDE, A, paths_in, scale_of
from weft.formats.header import read_header
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
    rank: int  # the largest of all layers
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
        """The factor before B A that other programs will use."""
        return scale_of(self.alpha, self.rank, self.rslora)


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
    rank = max((entry.shape[0] for key, entry in header.tensors.items() if key.endswith(A)), default=0)
    if not rank:
        raise ModelError(f"{path} holds no LoRA weights.")
    return Description(
        format=found.format,
        weights=found.weights,
        rank=rank,
        alpha=float(config.get("lora_alpha", config.get("r", rank))),
        rslora=bool(config.get("use_rslora", False)),
        dora=bool(config.get("use_dora", False)) or any(MAGNITUDE in key for key in header.tensors),
        targets=tuple(p.removeprefix(prefix) for p in paths_in(header.tensors)),
        keys=tuple(header.tensors),
        dtypes=dict(Counter(entry.dtype for entry in header.tensors.values())),
        parameters=sum(entry.numbers for entry in header.tensors.values()),
        metadata=provenance(header),
        size=header.size,
    )
