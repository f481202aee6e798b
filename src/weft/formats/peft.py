"""The folder that PEFT writes and reads: adapter_config.json beside adapter_model.safetensors."""

import json
from pathlib import Path

import torch
from torch import Tensor

from weft.durable import write_whole
from weft.errors import ModelError
from weft.formats.adapter_file import SOFT_PROMPTS, SavedAdapter, peft_fields
from weft.formats.canonical import saved_adapter
from weft.formats.foreign import with_canonical_names
from weft.formats.header import read_header
from weft.formats.peft_heads import peft_keys
from weft.formats.sniff import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS, STALE, provenance, read_config, sniff
from weft.formats.soft_prompts import prompt_fields, prompt_keys, read_prompts
from weft.formats.tensor_file import read_tensors, write_tensors


class PeftFolder:
    """Keys `base_model.model.PATH.lora_A.weight`; alpha in the config, provenance in the header of the weights."""

    file: str | None = None

    def write(self, target: Path, adapter: SavedAdapter) -> Path:
        """Write the folder that `PeftModel.from_pretrained` takes; returns it."""
        folder = target
        if folder.suffix == ".safetensors":
            raise ModelError(f"the peft format is a folder of two files: leave .safetensors off {folder}.")
        # The weights first: a folder is an adapter from the moment that its config stands there.
        if adapter.kind in SOFT_PROMPTS:
            fields, tensors = prompt_fields(adapter), prompt_keys(adapter)
        else:
            own = peft_keys(adapter.tensors, adapter.paths, adapter.whole)
            fields, tensors = peft_fields(adapter), {PEFT_PREFIX + key: tensor for key, tensor in own.items()}
        kept = {key: value for key, value in adapter.metadata.items() if key not in STALE}
        write_tensors(folder / PEFT_WEIGHTS, tensors, kept)
        # PEFT warns of fields that it does not know, so nothing of ours is added.
        base = {"base_model_name_or_path": adapter.metadata.get("base_model")}
        config = {**fields, **base, "inference_mode": True}
        write_whole(folder / PEFT_CONFIG, json.dumps(config, indent=2) + "\n")
        return folder

    def read(self, path: Path) -> SavedAdapter:
        """Read the folder, or the weights file in it."""
        found = sniff(path)
        if found.format != "peft":
            raise ModelError(f"{path} is a {found.format} adapter, not a PEFT folder.")
        config = read_config(found.weights.parent / PEFT_CONFIG)
        tensors, metadata = _weights(found.weights)
        kind = next((kind for kind, name in SOFT_PROMPTS.items() if name == config.get("peft_type")), None)
        if kind is not None:
            return read_prompts(kind, tensors, config, metadata, path)
        canonical = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
        return with_canonical_names(saved_adapter(canonical, config, metadata, path))


def _weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if file.suffix == ".safetensors":
        metadata = provenance(read_header(file))
        return read_tensors(file), metadata
    try:
        # weights_only: a pickle could otherwise run any code.
        return torch.load(file, map_location="cpu", weights_only=True), {}
    except Exception as error:  # torch raises many kinds for a damaged or unsafe pickle
        raise ModelError(f"{file} cannot be read as plain weights: {error}") from error
