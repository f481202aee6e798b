"""Reading and writing the tensors of safetensors files that other programs write and read."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft.durable import whole_file
from weft.errors import ModelError

# What an adapter's numbers are stored as. bf16 holds those of fp8 exactly, and unlike them can be reckoned with.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file by their names. Those of one number may be whole, as some alphas are.

    Raises ModelError for a damaged file, for weights in whole numbers or packed, and for NaN and infinity among them.
    """
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}.") from error
    return {name: _weights(name, tensor, path) for name, tensor in found.items()}


def _weights(name: str, tensor: Tensor, path: Path) -> Tensor:
    tensor = tensor.bfloat16() if tensor.dtype in NARROW else tensor
    if tensor.dtype not in FLOATS and tensor.numel() != 1:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(f"{path}: '{name}' is stored as {kind}; Weft reads weights in fp32, bf16, fp16 and fp8.")
    ends = torch.stack(tensor.aminmax()) if tensor.numel() else tensor  # many times faster than to ask each number
    if not bool(ends.isfinite().all()):
        lost = int(tensor.isfinite().logical_not().sum())
        raise ModelError(
            f"{path}: {lost} of the {tensor.numel()} numbers of '{name}' are NaN or infinite. Its training went wrong: "
            "take an earlier one."
        )
    return tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with metadata in its header, whole or not at all."""
    separate = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as draft:
        draft.touch()
        mode = draft.stat().st_mode
        # diffusers and transformers refuse files whose header does not say "pt".
        save_file(separate, draft, metadata={**metadata, "format": "pt"})
        # The library leaves files that only their owner can read, whatever the umask says.
        draft.chmod(mode)
