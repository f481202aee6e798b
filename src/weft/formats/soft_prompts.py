"""Virtual tokens in a PEFT folder: one tensor of them, whatever network made it, and the heads beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import ModelError
from weft.formats.adapter_file import EMBEDDING, SOFT_PROMPTS, SavedAdapter
from weft.formats.peft_heads import parted

if TYPE_CHECKING:
    from torch import Tensor

PEFT_EMBEDDING = "prompt_embeddings"  # peft.utils.save_and_load
PREFIX = "base_model."  # of the base's own modules: around it PEFT has no second wrapper here


def prompt_fields(adapter: SavedAdapter) -> dict[str, Any]:
    """Fields of PEFT's config of this kind."""
    return {
        "peft_type": SOFT_PROMPTS[adapter.kind],
        "task_type": "SEQ_CLS",
        "num_transformer_submodules": 1,
        "modules_to_save": list(adapter.whole),
        **adapter.options,
    }


def prompt_keys(adapter: SavedAdapter) -> "dict[str, Tensor]":
    """The tensors under the names that PEFT's loader looks for."""
    return {PEFT_EMBEDDING if key == EMBEDDING else PREFIX + key: t for key, t in adapter.tensors.items()}


def read_prompts(
    kind: str, tensors: "Mapping[str, Tensor]", config: Mapping[str, Any], metadata: Mapping[str, str], path: Path
) -> SavedAdapter:
    """The adapter in a folder of this kind. Raises ModelError for a folder without virtual tokens."""
    if PEFT_EMBEDDING not in tensors:
        raise ModelError(f"{path} holds no virtual tokens: '{PEFT_EMBEDDING}' is missing.")
    found = parted(
        {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key != PEFT_EMBEDDING}, config
    )
    if found.layers or found.biases:
        first = next(iter({**found.layers, **found.biases}))
        raise ModelError(f"{path} holds tensors that belong to no adapter of kind {kind}, first '{first}'.")
    names = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
    return SavedAdapter(
        {EMBEDDING: tensors[PEFT_EMBEDDING], **found.whole},
        rank=0,
        alpha=0.0,
        metadata=dict(metadata),
        kind=kind,
        options={name: config[name] for name in names if config.get(name) is not None},
        whole=found.modules,
    )
