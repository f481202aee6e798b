"""What lies at a path: which adapter format, or else a name for what was found. Reads names only, never tensors."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import ModelError
from weft.formats.adapter_file import MAGNITUDE, A, B, kind_in, scale_of
from weft.formats.header import Header, read_header
from weft.formats.keys import NAMES, format_of

PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."
DIFFUSERS_METADATA = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY

# Entries of a header that are about the file as it is, and not about the adapter: each writer makes its own.
STALE = ("format", DIFFUSERS_METADATA, NAMES, "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")

# The files of our other formats by their usual names (weft.formats.*), in the order in which they are looked for.
OTHER_WEIGHTS = (
    "lora_comfyui.safetensors", "lora_musubi.safetensors", "lora_videox_fun.safetensors", "lora_original.safetensors",
)  # fmt: skip


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
    style = format_of(keys)
    if style is None or style == "peft":
        raise ModelError(f"{path} is {name_of(keys)}. Weft reads adapters: PEFT folders and LoRA files.")
    return Found(style, path)


def is_plain(keys: Iterable[str]) -> bool:
    """Whether all tensors have the names that diffusers itself gives them; other programs vary them, and add alphas."""
    return all(key.startswith(DIFFUSERS_PREFIX) and key.endswith((A, B, MAGNITUDE)) for key in keys)


def is_adapter(path: Path) -> bool:
    """Whether the names in a safetensors file are those of an adapter of any program."""
    keys = read_header(path).tensors
    return (_all_begin(keys, PEFT_PREFIX) and kind_in(keys) is not None) or format_of(keys) is not None


def _sniff_folder(folder: Path) -> Found:
    if (folder / PEFT_CONFIG).exists():
        for name in (PEFT_WEIGHTS, PEFT_PICKLE):
            if (folder / name).exists():
                return _in_peft_folder(folder / name)
        raise ModelError(f"{folder} is a PEFT folder without weights: {PEFT_WEIGHTS} is missing.")
    if (folder / DIFFUSERS_WEIGHTS).exists():
        return Found("diffusers", folder / DIFFUSERS_WEIGHTS)
    for name in OTHER_WEIGHTS:
        if (folder / name).exists():
            return sniff(folder / name)
    names = sorted(entry.name for entry in folder.iterdir())
    inside = f"{', '.join(names[:5])}{' and more' if len(names) > 5 else ''}" if names else "nothing"
    if "manifest.json" in names and "state.safetensors" in names:
        raise ModelError(
            f"{folder} is a checkpoint that a run goes on from. Adapters are beside the folder of checkpoints, such as "
            f"{folder.parent.parent / folder.name}."
        )
    if "model_index.json" in names or "config.json" in names:
        raise ModelError(f"{folder} is a whole model, not an adapter (it holds {inside}).")
    weights = [folder / name for name in names if name.endswith(".safetensors")]
    if len(weights) == 1 and is_adapter(weights[0]):
        return sniff(weights[0])
    expected = f"expected {PEFT_CONFIG}, {DIFFUSERS_WEIGHTS} or one LoRA file"
    raise ModelError(f"{folder} is no adapter folder: {expected}, found {inside}.")


def _in_peft_folder(weights: Path) -> Found:
    """diffusion-pipe lays PEFT's config beside a file with ComfyUI's names."""
    if weights.suffix == ".safetensors":
        keys = read_header(weights).tensors
        if not _all_begin(keys, PEFT_PREFIX) and (style := format_of(keys)) in ("comfyui", "original"):
            return Found(str(style), weights)
    return Found("peft", weights)


def name_of(keys: Iterable[str]) -> str:
    """A phrase for a file that is none of our formats, from its tensor names."""
    names = list(keys)
    if not names:
        return "an empty safetensors file"
    example = f"{len(names)} tensors, first '{names[0]}'"
    if any(mark in name for name in names for mark in (".oft_", ".boft_", ".ia3_", ".vera_", ".fourierft_")):
        return f"an adapter that is no LoRA ({example})"
    if any(name.startswith(PEFT_PREFIX) for name in names):
        return f"a PEFT adapter mixed with other tensors ({example})"
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


def scale_beside(weights: Path) -> float | None:
    """Of layers without an alpha of their own, where PEFT's config says it that diffusion-pipe leaves beside them."""
    if weights.name != PEFT_WEIGHTS or not (weights.parent / PEFT_CONFIG).exists():
        return None
    config = read_config(weights.parent / PEFT_CONFIG)
    rank = int(config.get("r", 8))
    return scale_of(float(config.get("lora_alpha", rank)), rank, bool(config.get("use_rslora", False)))


def diffusers_config(metadata: Mapping[str, str], source: Path, prefix: str = DIFFUSERS_PREFIX) -> dict[str, Any]:
    """The LoraConfig fields that diffusers keeps of a network in a file's header; empty when it keeps none."""
    raw = metadata.get(DIFFUSERS_METADATA)
    try:
        fields = json.loads(raw) if raw else {}
    except ValueError as error:
        raise ModelError(f"{source}: '{DIFFUSERS_METADATA}' in the header is not valid JSON: {error}.") from error
    return {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}


def provenance(header: Header) -> dict[str, str]:
    """A header's metadata without the entries that belong to the format."""
    return {key: value for key, value in header.metadata.items() if key not in STALE}


def _all_begin(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)
