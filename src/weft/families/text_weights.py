"""The tensors of a transformers checkpoint under the names of its network, as transformers itself renames and joins
them: a mixture of experts has one tensor for all of them, and its files one for each."""

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from weft.errors import ModelError
from weft.families.stored import WeightFiles
from weft.families.weights import Source
from weft.names.rules import Names, Piece


@dataclass(frozen=True)
class Joined:
    """How one of a network's tensors is made of several in the files. parts: (pattern of transformers, name in the
    files), in the order in which they are joined."""

    converter: WeightConverter
    first: str  # under which transformers makes it; several tensors may come of one making
    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class JoinedSource(Source):
    """A source some of whose tensors are joined as they are read."""

    joined: dict[str, Joined]
    made: Callable[[Joined, Callable[[str], Tensor]], Mapping[str, Tensor]]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.joined:
            return super().shape(name)
        return self.shapes_of(self.joined[name])[name]

    def shapes_of(self, joined: Joined) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is made together."""
        made = self.made(joined, lambda part: torch.empty(self.weights.entries[part].shape, device="meta"))
        return {name: tuple(tensor.shape) for name, tensor in made.items()}

    def read(self, name: str) -> Tensor:
        if name not in self.joined:
            return super().read(name)
        return self.made(self.joined[name], self.weights.read)[name]


def open_source(weights: WeightFiles, network: PreTrainedModel, folder: Path) -> JoinedSource:
    """The tensors in files under the names of a network that has shapes only. Raises ModelError."""
    label = f"family.source: {folder}"
    names, joined = _names(weights, network)

    def made(joined: Joined, read: Callable[[str], Tensor]) -> Mapping[str, Tensor]:
        return _make(joined, read, network)

    source = JoinedSource(weights, names, {}, label, {}, made)
    for each in joined:
        for name in source.shapes_of(each):
            names[name] = Piece(each.parts[0][1])
            source.joined[name] = each
    return source


def _names(weights: WeightFiles, network: PreTrainedModel) -> tuple[Names, list[Joined]]:
    """Names in the network of tensors that are read as they are, and how the others are joined; what transformers
    ignores is left out."""
    mapping = get_model_conversion_mapping(network)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known: dict[str, Any] = dict(network.state_dict(keep_vars=True))
    ignored = [re.compile(pattern) for pattern in network._keys_to_ignore_on_load_unexpected or ()]
    names: Names = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(weights.entries, key=dot_natural_key):
        ours, pattern = rename_source_key(name, renamings, converters, network.base_model_prefix, known)
        if ours not in known and name in known:
            ours, pattern = name, None
        if pattern is not None:
            parts.setdefault(ours, []).append((pattern, name))
        elif ours in known or not any(regex.search(ours) for regex in ignored):
            names[ours] = Piece(name)
    return names, [Joined(by_pattern[of[0][0]], first, tuple(of)) for first, of in parts.items()]


def _make(joined: Joined, read: Callable[[str], Tensor], network: PreTrainedModel) -> Mapping[str, Tensor]:
    """Let transformers join what is read; it may give several tensors."""
    own = deepcopy(joined.converter)
    for pattern, part in joined.parts:
        own.add_tensor(joined.first, part, pattern, read(part))  # type: ignore[arg-type]  # as when it saves
    made = own.convert(joined.first, model=network, config=network.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def check_readable(config: Mapping[str, Any], folder: Path) -> None:
    """Raises ModelError for weights that another program packed."""
    packed = config.get("quantization_config")
    if packed:
        raise ModelError(
            f"family.source: the weights in {folder} are quantized ({packed.get('quant_method', 'in an unknown way')}) "
            "in a way that Weft cannot read. Take the model in bf16 or fp16; family.dtype=nf4, int8 or fp8 makes it as "
            "small."
        )
