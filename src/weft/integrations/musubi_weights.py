"""Files of LoRA weights as musubi-tuner reads and writes them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from weft.errors import ModelError
from weft.formats.kohya_header import tensor_hashes
from weft.formats.tensor_file import write_tensors
from weft.integrations.musubi_layer import Width

DOWN, UP, ALPHA, DORA_SCALE = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"


def read_weights(path: Path) -> dict[str, Tensor]:
    """A file's tensors, by their names. Raises ModelError for one that is no safetensors file."""
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: weights are read from .safetensors files alone, which run nothing when read.")
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} is no whole safetensors file: {error}.") from None


def write_weights(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> None:
    """Write a network's state in a dtype, with the hashes that kohya's tools look for. Raises ModelError.

    Alphas are written in that dtype too, as musubi does, but for those that it cannot hold: a scale is never rounded.
    """
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: weights are written as .safetensors alone; give the file that ending.")
    cast = {key: _cast(key, tensor.detach().cpu(), dtype) for key, tensor in tensors.items()}
    # Of a file that is written again the header has the older one's hashes.
    kept = {key: value for key, value in metadata.items() if not key.startswith("sshs_")}
    hashes = tensor_hashes(cast, kept)
    found = {key: hashes[key] for key in ("sshs_model_hash", "sshs_legacy_hash")}
    write_tensors(path, cast, {**kept, **found})


def _cast(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return tensor.clone().contiguous()
    narrow = tensor.to(dtype, copy=True).contiguous()
    return tensor if key.endswith(f".{ALPHA}") and not torch.equal(narrow.to(tensor.dtype), tensor) else narrow


def widths_in(weights: Mapping[str, Tensor]) -> dict[str, Width]:
    """Name of an adapted layer -> rank and alpha of its LoRA; without an alpha the scale is 1. Raises ModelError for
    weights that are no LoRA in musubi's names."""
    widths = {
        key.removesuffix(f".{DOWN}"): Width.of(len(tensor), _alpha(weights, key.removesuffix(f".{DOWN}")))
        for key, tensor in weights.items()
        if key.endswith(f".{DOWN}")
    }
    if not widths or not all(f"{name}.{UP}" in weights for name in widths):
        first = next(iter(weights), "nothing")
        raise ModelError(
            f"weft.integrations.musubi reads LoRA files in musubi's names (lora_unet_….{DOWN}, .{UP}, .{ALPHA}), and "
            f"this has '{first}'. Write it anew: weft convert FILE --to musubi; LoHa and LoKr are for "
            "networks.loha and networks.lokr."
        )
    return widths


def _alpha(weights: Mapping[str, Tensor], name: str) -> float | None:
    alpha = weights.get(f"{name}.{ALPHA}")
    return None if alpha is None else float(alpha)
