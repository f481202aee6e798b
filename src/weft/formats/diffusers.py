"""The single file that diffusers pipelines load: pytorch_lora_weights.safetensors."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.errors import ModelError
from weft.formats.adapter_file import A, SavedAdapter, paths_in, peft_fields
from weft.formats.canonical import saved_adapter
from weft.formats.foreign import read_foreign
from weft.formats.header import read_header
from weft.formats.single_file import file_at, refuse_kind, refuse_language_models, write_file
from weft.formats.sniff import (
    DIFFUSERS_METADATA,
    DIFFUSERS_PREFIX,
    DIFFUSERS_WEIGHTS,
    diffusers_config,
    is_plain,
    provenance,
    sniff,
)
from weft.formats.strangers import stranger
from weft.formats.tensor_file import read_tensors

DIFFUSERS = "https://github.com/huggingface/diffusers"  # whose names the file has


class DiffusersFile:
    """Keys `transformer.PATH.lora_A.weight`; alpha, rsLoRA and DoRA in the header, where diffusers >= 0.34 looks.

    Wan 2.2's low-noise expert takes the same file with `load_into_transformer_2=True`.
    """

    file: str | None = DIFFUSERS_WEIGHTS

    def write(self, target: Path, adapter: SavedAdapter) -> Path:
        """Write a file for `load_lora_weights`, or one into a folder; returns it. Raises ModelError for other kinds."""
        refuse_kind(adapter, "diffusers", ("lora",), also=("dora",))
        refuse_language_models(adapter, "diffusers")
        tensors = {DIFFUSERS_PREFIX + key: tensor for key, tensor in adapter.tensors.items()}
        config = {DIFFUSERS_PREFIX + key: value for key, value in peft_fields(adapter).items()}
        header = {DIFFUSERS_METADATA: json.dumps(config, sort_keys=True)}
        return write_file(file_at(target, DIFFUSERS_WEIGHTS), adapter, tensors, implementation=DIFFUSERS, more=header)

    def read(self, path: Path) -> SavedAdapter:
        """Read the file, or the folder that holds it. A file that says nothing of alpha means scale 1."""
        found = sniff(path)
        if found.format != "diffusers":
            raise ModelError(f"{path} is a {found.format} adapter, not a diffusers LoRA file.")
        header = read_header(found.weights)
        if not is_plain(header.tensors):
            return read_foreign(found.weights)
        if other := stranger(header.tensors, header.metadata):
            raise ModelError(f"{path} is {other}. Weft reads those of Wan and HunyuanVideo.")
        tensors = {key.removeprefix(DIFFUSERS_PREFIX): tensor for key, tensor in read_tensors(found.weights).items()}
        config = diffusers_config(header.metadata, path) or _config_of_ranks(tensors)
        return saved_adapter(tensors, config, provenance(header), path)


def _config_of_ranks(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields for a file without metadata: alpha is each layer's own rank."""
    return {"alpha_pattern": {f"^{re.escape(path)}": tensors[path + A].shape[0] for path in paths_in(tensors)}}
