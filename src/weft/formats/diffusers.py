"""The single file that diffusers pipelines load: pytorch_lora_weights.safetensors."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from weft.errors import ModelError
from weft.formats.adapter_file import A, SavedAdapter, paths_in, peft_fields
from weft.formats.canonical import saved_adapter
from weft.formats.header import read_header
from weft.formats.sniff import (
    DIFFUSERS_METADATA,
    DIFFUSERS_PREFIX,
    DIFFUSERS_WEIGHTS,
    diffusers_config,
    provenance,
    sniff,
)
from weft.formats.tensor_file import write_tensors


class DiffusersFile:
    """Keys `transformer.PATH.lora_A.weight`; alpha, rsLoRA and DoRA in the header, where diffusers >= 0.34 looks.

    Wan 2.2's low-noise expert takes the same file with `load_into_transformer_2=True`.
    """

    def write(self, folder: Path, adapter: SavedAdapter) -> Path:
        """Write the file for `load_lora_weights` into a folder; returns the file. Raises ModelError for other kinds."""
        if adapter.kind != "lora":
            raise ModelError(
                f"the diffusers format holds LoRA alone, and this adapter is of kind {adapter.kind}. "
                "Write save.formats=[peft]."
            )
        tensors = {DIFFUSERS_PREFIX + key: tensor for key, tensor in adapter.tensors.items()}
        config = {DIFFUSERS_PREFIX + key: value for key, value in peft_fields(adapter).items()}
        metadata = {**adapter.metadata, DIFFUSERS_METADATA: json.dumps(config, sort_keys=True)}
        write_tensors(folder / DIFFUSERS_WEIGHTS, tensors, metadata)
        return folder / DIFFUSERS_WEIGHTS

    def read(self, path: Path) -> SavedAdapter:
        """Read the file, or the folder that holds it. A file that says nothing of alpha means scale 1."""
        found = sniff(path)
        if found.format != "diffusers":
            raise ModelError(f"{path} is a {found.format} adapter, not a diffusers LoRA file.")
        header = read_header(found.weights)
        tensors = {key.removeprefix(DIFFUSERS_PREFIX): tensor for key, tensor in load_file(found.weights).items()}
        config = diffusers_config(header.metadata, path) or _config_of_ranks(tensors)
        return saved_adapter(tensors, config, provenance(header), path)


def _config_of_ranks(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields for a file without metadata: alpha is each layer's own rank."""
    return {"alpha_pattern": {f"^{re.escape(path)}": tensors[path + A].shape[0] for path in paths_in(tensors)}}
