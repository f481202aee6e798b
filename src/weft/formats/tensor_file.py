"""Writing safetensors files that other programs read."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from weft.durable import whole_file


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
