"""Small encoders of real classes with adapters on them, and one question to each."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.small_encoders import save_tiny_encoder
from weft.adapters.attach import Standing, attach
from weft.adapters.ia3 import Ia3
from weft.adapters.lora import Lora
from weft.adapters.named import NamedAdapters
from weft.adapters.no_adapter import NoAdapter
from weft.adapters.prompts import Prefix, Prompt, PTuning
from weft.adapters.recipe import Recipe
from weft.contracts import DEFAULT, Berth, Documents, Model
from weft.families.encoder import Encoder

CLASSES = ("cold", "flu", "well")
FOLDER = TemporaryDirectory(prefix="weft-encoders-")
NAME = DEFAULT.name
KINDS: Mapping[str, Recipe] = {
    "lora": Lora(targets="auto", rank=3, alpha=5.0),
    "lora, all biases": Lora(targets="auto", rank=3, bias="all"),
    "lora, own biases": Lora(targets="auto", rank=3, bias="lora_only"),
    "lora, unfused": Lora(targets="auto", rank=3, alpha=5.0, fused=False),
    "native lora": Lora(targets="auto", rank=3, backend="native"),
    "dora": Lora(targets="auto", rank=3, dora=True),
    "pissa": Lora(targets="auto", rank=3, init="pissa", pissa_iterations=None),
    "ia3": Ia3(),
    "prompt": Prompt(tokens=3),
    "p-tuning": PTuning(tokens=3, hidden=8),
    "p-tuning by an LSTM": PTuning(tokens=3, hidden=8, network="lstm"),
    "prefix": Prefix(tokens=3),
    "prefix, projected": Prefix(tokens=3, projection=True, hidden=8),
}
ALL_KINDS: Mapping[str, Recipe] = {**KINDS, "none": NoAdapter()}


@cache
def source(model_type: str = "bert") -> Path:
    """A folder of a bare encoder, made once for all tests of a process."""
    return save_tiny_encoder(Path(FOLDER.name) / model_type, model_type)


@dataclass(frozen=True)
class Fitted:
    """An encoder with an adapter that has its first values."""

    family: Encoder
    network: PreTrainedModel
    adapters: NamedAdapters
    recipe: Recipe

    @property
    def model(self) -> Model:
        return Model(self.network, self.family, self.adapters)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.adapters.parameters(NAME)

    def answer(self, name: str | None = NAME, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        with self.adapters.use(name):
            return Model(self.network, self.family, self.adapters, weights).logits(question())

    def shake(self, by: float = 0.1) -> None:
        """As after training: every trained tensor has moved."""
        chance = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter += by * torch.randn(parameter.shape, generator=chance).to(parameter.dtype)


@cache
def family_of(model_type: str = "bert", folder: Path | None = None) -> Encoder:
    return Encoder(source=str(folder or source(model_type)), labels=CLASSES, multi_label=False)


def read(family: Encoder) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A bare network of one's own, and the modules of it that are trained whole."""
    network, heads = _read(family)
    return deepcopy(network), heads


@cache
def _read(family: Encoder) -> tuple[PreTrainedModel, tuple[str, ...]]:
    network = family.load("fp32", NAME, Berth())
    return network, family.heads(network)


def fitted(recipe: Recipe, model_type: str = "bert", seed: int = 0, family: Encoder | None = None) -> Fitted:
    """As `run/assemble.py` does it: read, matched, attached, begun."""
    family = family or family_of(model_type)
    network, heads = read(family)
    heads = heads if recipe.has_base else ()
    report = recipe.match(recipe.layers(network), family.targets, family.aliases)
    adapters = attach(network, {NAME: Standing(recipe, report.paths, heads)}, seed)
    adapters.initialize()
    return Fitted(family, network, adapters, recipe)


def question(rows: int = 3, length: int = 9) -> Documents:
    """Documents of words that the tokenizer knows, the last of them shorter."""
    ids = torch.randint(6, 150, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[-1, length - 3 :] = False
    return Documents(ids, mask)
