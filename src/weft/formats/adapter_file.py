"""An adapter as it lies in a file, whatever the format: canonical tensors and the facts that give them a scale."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from weft.few_steps import StepList

if TYPE_CHECKING:
    from torch import Tensor

STEP_LIST = "weft.step_list"  # in the metadata of a few-step student: the times at which it is asked, as JSON
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"

# Ends of the canonical tensor names of each kind, the one first that every adapted layer has; LoKr has two such.
ENDS: Mapping[str, tuple[str, ...]] = {
    "lora": (A, B, MAGNITUDE),
    "loha": (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"),
    "lokr": (".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b"),
    "oft": (".oft_R.weight",),
    "ia3": (".ia3_l",),
}
EMBEDDING = "prompt_encoder.embedding.weight"  # canonical name of virtual tokens: (tokens, width) of each
SOFT_PROMPTS = {"prompt": "PROMPT_TUNING", "p-tuning": "P_TUNING", "prefix": "PREFIX_TUNING"}  # in PEFT's words
FIRST = (
    A,
    ".hada_w1_a",
    ".lokr_w1",
    ".lokr_w1_a",
    ".oft_R.weight",
    ".ia3_l",
)  # exactly one of these stands on each layer


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter with its facts. Of a LoRA every layer's change is scale B A (with DoRA normed), with one scale for all
    linear layers and one for all convolutions."""

    tensors: "Mapping[str, Tensor]"  # canonical: PATH.lora_A.weight (rank, in), PATH.lora_B.weight (out, rank)
    rank: int  # 0 in OFT, which has none
    alpha: float  # 0 in OFT
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = ()  # paths of the adapted layers; empty: those that tensors name
    metadata: Mapping[str, str] = field(default_factory=dict)  # provenance, never needed to compute a layer's change
    kind: str = "lora"  # lora, loha, lokr, oft, ia3; prompt, p-tuning, prefix; none: a whole network
    conv_rank: int | None = None  # of convolutions, whose A is (rank, in, *kernel) and B (out, rank, 1, ...)
    conv_alpha: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # fields of PEFT's config that only this kind has
    whole: tuple[str, ...] = ()  # paths of modules that were trained whole beside it: tensors PATH.KEY
    bias: str = "none"  # all or lora_only: the network's own biases that were trained beside it, tensors PATH.bias

    @property
    def scale(self) -> float:
        """The factor before the change of a linear layer; 1 where the kind has none."""
        return scale_of(self.alpha, self.rank, self.rslora) if self.rank else 1.0

    @property
    def conv_scale(self) -> float | None:
        """The factor before B A of a convolution; None where none is adapted."""
        if self.conv_rank is None or self.conv_alpha is None:
            return None
        return scale_of(self.conv_alpha, self.conv_rank, self.rslora)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the adapted layers."""
        return self.targets or paths_in(self.tensors)

    @property
    def step_list(self) -> StepList | None:
        """The times at which a few-step student is asked; None for an adapter that is none. Raises ValueError."""
        return StepList.from_json(self.metadata[STEP_LIST]) if STEP_LIST in self.metadata else None

    def scale_at(self, path: str) -> float:
        """The factor before B A of a LoRA's layer."""
        scale = self.conv_scale if self.tensors[path + A].dim() > 2 else self.scale
        assert scale is not None, f"'{path}' is a convolution, and the adapter has no conv_rank"
        return scale


class AdapterFormat(Protocol):
    """A way to lay an adapter down: what write has written, read returns."""

    file: str | None  # its usual name within a folder; None: the format is a folder

    def write(self, target: Path, adapter: SavedAdapter) -> Path:
        """Write into a folder, made when missing, or where a format is one file to a path that ends in .safetensors.

        Returns the path that other programs are given. Raises ModelError for a kind or model that the format cannot
        hold, and names those that can.
        """
        ...

    def read(self, path: Path) -> SavedAdapter:
        """Read a folder or file. Raises ModelError naming what was found in place of an adapter."""
        ...


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732)."""
    return alpha / (sqrt(rank) if rslora else rank)


def paths_in(keys: Iterable[str]) -> tuple[str, ...]:
    """Paths of the adapted layers, in the order of their first tensor."""
    return tuple(key.removesuffix(end) for key in keys for end in FIRST if key.endswith(end))


def kind_in(keys: Iterable[str]) -> str | None:
    """The kind of adapter that tensors with such names are; None when they are none."""
    names = tuple(keys)
    return next((kind for kind, ends in ENDS.items() if any(name.endswith(ends) for name in names)), None)


def peft_fields(adapter: SavedAdapter) -> dict[str, Any]:
    """The facts as fields of PEFT's config, and the paths of the layers. Provenance is none of its fields."""
    fields = {"task_type": None, "target_modules": list(adapter.paths), **FIELDS[adapter.kind](adapter)}
    if adapter.whole:  # of a classifier, whose head PEFT then looks for by this
        fields |= {"task_type": "SEQ_CLS", "modules_to_save": list(adapter.whole)}
    return fields | ({"bias": adapter.bias} if adapter.bias != "none" else {})


def lora_fields(adapter: SavedAdapter) -> dict[str, Any]:
    """Fields of LoraConfig, which diffusers reads too."""
    convolutions = [p for p in adapter.paths if adapter.tensors[p + A].dim() > 2] if adapter.conv_rank else []
    patterns = [f"^{re.escape(path)}" for path in convolutions]
    return {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": _number(adapter.alpha),
        "lora_dropout": 0.0,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "bias": "none",
        **({"rank_pattern": dict.fromkeys(patterns, adapter.conv_rank)} if patterns else {}),
        **({"alpha_pattern": dict.fromkeys(patterns, _number(adapter.conv_alpha or 0))} if patterns else {}),
    }


def loha_fields(adapter: SavedAdapter) -> dict[str, Any]:
    """Fields of LoHaConfig."""
    return {"peft_type": "LOHA", **_lycoris_fields(adapter)}


def lokr_fields(adapter: SavedAdapter) -> dict[str, Any]:
    """Fields of LoKrConfig."""
    return {"peft_type": "LOKR", **_lycoris_fields(adapter), **adapter.options}


def oft_fields(adapter: SavedAdapter) -> dict[str, Any]:
    """Fields of OFTConfig."""
    return {"peft_type": "OFT", "r": 0, "module_dropout": 0.0, "bias": "none", **adapter.options}


def ia3_fields(adapter: SavedAdapter) -> dict[str, Any]:
    """Fields of IA3Config."""
    return {"peft_type": "IA3", **adapter.options}


FIELDS: Mapping[str, Callable[[SavedAdapter], dict[str, Any]]] = {
    "lora": lora_fields,
    "loha": loha_fields,
    "lokr": lokr_fields,
    "oft": oft_fields,
    "ia3": ia3_fields,
}


def _lycoris_fields(adapter: SavedAdapter) -> dict[str, Any]:
    return {"r": adapter.rank, "alpha": _number(adapter.alpha), "rank_dropout": 0.0, "module_dropout": 0.0}


def _number(alpha: float) -> float | int:
    """PEFT annotates alphas as whole numbers, and takes others."""
    return int(alpha) if alpha == int(alpha) else alpha
