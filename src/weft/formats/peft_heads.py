"""What a PEFT folder holds beside the layers of an adapter: modules that were trained whole, and biases of the base."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import ModelError
from weft.formats.adapter_file import ENDS, SOFT_PROMPTS, SavedAdapter

if TYPE_CHECKING:
    from torch import Tensor

WRAPPED = ".base_layer.bias"  # end of the bias of a layer that PEFT has wrapped
OF_LAYERS = tuple(end for ends in ENDS.values() for end in ends)


@dataclass
class Parted:
    """The tensors of a folder by what they are, all under the network's own names."""

    layers: "dict[str, Tensor]" = field(default_factory=dict)
    whole: "dict[str, Tensor]" = field(default_factory=dict)
    biases: "dict[str, Tensor]" = field(default_factory=dict)
    modules: tuple[str, ...] = ()  # paths of those that were trained whole


def parted(tensors: "Mapping[str, Tensor]", config: Mapping[str, Any]) -> Parted:
    """Tell the tensors of a folder apart by PEFT's fields modules_to_save and bias."""
    found, modules = Parted(), list[str]()
    has_biases = str(config.get("bias", "none")) != "none"
    for key, tensor in tensors.items():
        module = _module_of(key, config.get("modules_to_save") or ())
        if key.endswith(OF_LAYERS):
            found.layers[key] = tensor
        elif module is not None:
            modules.append(module)
            found.whole[key] = tensor
        elif has_biases and "bias" in key.rpartition(".")[2]:
            found.biases[key.removesuffix(WRAPPED) + ".bias" if key.endswith(WRAPPED) else key] = tensor
        else:
            found.layers[key] = tensor  # which refuses it by name
    found.modules = tuple(dict.fromkeys(modules))
    return found


def _module_of(key: str, names: Sequence[str]) -> str | None:
    """PEFT's rule: a module is trained whole where its path ends with one of the names."""
    for name in names:
        match = re.match(rf"(.*?{re.escape(name)})\.", key)
        if match:
            return match[1]
    return None


def peft_keys(tensors: "Mapping[str, Tensor]", paths: Sequence[str], whole: Sequence[str]) -> "dict[str, Tensor]":
    """The names that PEFT's loader looks for: a layer that it has wrapped keeps its own bias one step deeper."""
    own = tuple(f"{path}." for path in whole)
    wrapped = {f"{path}.bias": path + WRAPPED for path in paths}
    return {key if key.startswith(own) else wrapped.get(key, key): tensor for key, tensor in tensors.items()}


def refuse_heads(adapter: SavedAdapter, path: Path) -> None:
    """Raises ModelError for an adapter of an encoder where only changes of layers can be dealt with."""
    what = [f"modules trained whole ({', '.join(adapter.whole)})"] if adapter.whole else []
    what += ["biases of the model itself"] if adapter.bias != "none" else []
    what += [f"an adapter of kind {adapter.kind}"] if adapter.kind in (*SOFT_PROMPTS, "ia3") else []
    if what:
        raise ModelError(
            f"{path} holds {' and '.join(what)}, and this works on changes of linear layers alone. A run goes on from "
            "it by adapter.start_from, and PEFT loads it as it is."
        )
