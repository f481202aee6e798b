"""An adapter as it lies in a file, whatever the format: canonical tensors and the facts that give them a scale."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter with its facts. Every layer's change is scale B A (with DoRA normed), with one scale for all."""

    tensors: "Mapping[str, Tensor]"  # canonical: PATH.lora_A.weight (rank, in), PATH.lora_B.weight (out, rank)
    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = ()  # paths of the adapted layers; empty: those that tensors name
    metadata: Mapping[str, str] = field(default_factory=dict)  # provenance, never needed to compute

    @property
    def scale(self) -> float:
        """The factor before B A."""
        return scale_of(self.alpha, self.rank, self.rslora)


class AdapterFormat(Protocol):
    """A way to lay an adapter down: what write has written, read returns."""

    def write(self, folder: Path, adapter: SavedAdapter) -> Path:
        """Write into a folder, made when missing; returns the path that other programs are given."""
        ...

    def read(self, path: Path) -> SavedAdapter:
        """Read a folder or file. Raises ModelError naming what was found in place of an adapter."""
        ...


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732)."""
    return alpha / (sqrt(rank) if rslora else rank)


def paths_in(keys: Iterable[str]) -> tuple[str, ...]:
    """Paths of the adapted layers, in the order of their A."""
    return tuple(key.removesuffix(A) for key in keys if key.endswith(A))


def lora_config(adapter: SavedAdapter) -> dict[str, Any]:
    """The facts as fields of PEFT's LoraConfig, which diffusers reads too. Provenance is none of its fields."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": 0.0,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "target_modules": list(adapter.targets or paths_in(adapter.tensors)),
        "bias": "none",
    }
