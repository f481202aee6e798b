"""What lies at a path: which adapter format, or else a name for what was found. Reads names only, never tensors."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import ModelError
from weft.formats.adapter_file import kind_in
from weft.formats.header import Header, read_header

PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."
DIFFUSERS_METADATA = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY


@dataclass(frozen=True)
class Found:
    """An adapter's format, by its name in `plugins`, and the file with its weights."""

    format: str
    weights: Path


def sniff(path: Path) -> Found:
    """Tell the format at a path. Raises ModelError that names what is there in place of an adapter."""
    if not path.exists():
        raise ModelError(f"there is no adapter at {path}: no such file or folder.")
    if path.is_dir():
        return _sniff_folder(path)
    if path.name == PEFT_CONFIG:
        return _sniff_folder(path.parent)
    if path.name == PEFT_PICKLE and (path.parent / PEFT_CONFIG).exists():
        return Found("peft", path)
    if path.suffix != ".safetensors":
        raise ModelError(
            f"{path} is a {path.suffix or 'nameless'} file; an adapter is a folder or a .safetensors file."
        )
    keys = read_header(path).tensors
    if _all_begin(keys, PEFT_PREFIX) and kind_in(keys):
        return Found("peft", path)
    if _all_begin(keys, DIFFUSERS_PREFIX) and _has_lora(keys):
        return Found("diffusers", path)
    raise ModelError(f"{path} is {name_of(keys)}. Weft reads PEFT folders and diffusers LoRA files.")


def _sniff_folder(folder: Path) -> Found:
    if (folder / PEFT_CONFIG).exists():
        for name in (PEFT_WEIGHTS, PEFT_PICKLE):
            if (folder / name).exists():
                return Found("peft", folder / name)
        raise ModelError(f"{folder} is a PEFT folder without weights: {PEFT_WEIGHTS} is missing.")
    if (folder / DIFFUSERS_WEIGHTS).exists():
        return Found("diffusers", folder / DIFFUSERS_WEIGHTS)
    names = sorted(entry.name for entry in folder.iterdir())
    inside = f"{', '.join(names[:5])}{' and more' if len(names) > 5 else ''}" if names else "nothing"
    if "model_index.json" in names or "config.json" in names:
        raise ModelError(f"{folder} is a whole model, not an adapter (it holds {inside}).")
    raise ModelError(f"{folder} is no adapter folder: expected {PEFT_CONFIG} or {DIFFUSERS_WEIGHTS}, found {inside}.")


def name_of(keys: Iterable[str]) -> str:
    """A phrase for a file that is none of our formats, from its tensor names."""
    names = list(keys)
    if not names:
        return "an empty safetensors file"
    example = f"{len(names)} tensors, first '{names[0]}'"
    if any(".lora_down." in name or name.startswith("lora_unet") for name in names):
        return f"a kohya or musubi LoRA ({example})"
    if _all_begin(names, "diffusion_model.") and _has_lora(names):
        return f"a ComfyUI LoRA ({example})"
    if any(mark in name for name in names for mark in ("lokr_", "hada_", "oft_", "ia3_")):
        return f"an adapter that is no LoRA ({example})"
    if _has_lora(names):
        return f"a LoRA without a known prefix, so that its alpha is unknown ({example})"
    return f"no adapter but the weights of a model ({example})"


def read_config(path: Path) -> dict[str, Any]:
    """The fields of an adapter_config.json. Raises ModelError when it is missing or damaged."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing: without it the alpha of the weights is unknown.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold a JSON object, found a {type(config).__name__}.")
    return config


def diffusers_config(metadata: Mapping[str, str], source: Path) -> dict[str, Any]:
    """The LoraConfig fields that diffusers keeps in a file's header; empty when it keeps none."""
    raw = metadata.get(DIFFUSERS_METADATA)
    try:
        fields = json.loads(raw) if raw else {}
    except ValueError as error:
        raise ModelError(f"{source}: '{DIFFUSERS_METADATA}' in the header is not valid JSON: {error}.") from error
    prefix = DIFFUSERS_PREFIX
    return {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}


def provenance(header: Header) -> dict[str, str]:
    """A header's metadata without the entries that belong to the format."""
    return {key: value for key, value in header.metadata.items() if key not in ("format", DIFFUSERS_METADATA)}


def _all_begin(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _has_lora(names: Iterable[str]) -> bool:
    return any(".lora_A." in name for name in names)
